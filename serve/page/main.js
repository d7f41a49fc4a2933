// The page: a conversation on one side, the experts on the other.

import { about, complete, modelName } from "./api.js";
import { Answer, said } from "./answer.js";
import { Experts } from "./experts.js";

const byId = (id) => document.getElementById(id);
const [log, prompt, problem, send, stop] = ["log", "prompt", "problem", "send", "stop"].map(byId);
const ENDINGS = { stop: "ended by itself", length: "most tokens reached", deadline: "out of time" };

let model = "";
let messages = [];
let answers = [];
let running = null; // the AbortController of the answer that is coming
let marked = null;

const experts = new Experts((cell) => {
  marked = cell;
  answers.forEach((answer) => answer.mark(cell));
});

function look(token, answer) {
  if (token && answer) answers.filter((other) => other !== answer && other.chosen >= 0).forEach((other) => other.choose(-1));
  experts.look(token);
}

/** Settings as the API takes them; an Error with one sentence for one that is wrong. */
function settings() {
  const body = {};
  for (const id of ["temperature", "top_p", "max_tokens", "seed"]) {
    const field = byId(id);
    if (!field.checkValidity()) {
      byId("settings").open = true;
      field.focus();
      throw new Error(`${field.parentElement.textContent.trim()}: ${field.validationMessage}`);
    }
    if (field.value !== "") body[id] = Number(field.value);
  }
  return body;
}

function report(error) {
  problem.textContent = error ? error.message || String(error) : "";
  problem.hidden = !error;
}

function busy(controller) {
  running = controller;
  send.hidden = Boolean(controller);
  stop.hidden = !controller;
}

/** Whether the end of an answer is in view, and so should stay there. */
function atEnd(answer) {
  return answer.facts.getBoundingClientRect().top < byId("form").getBoundingClientRect().top + 80;
}

function toEnd(answer) {
  answer.facts.scrollIntoView({ block: "nearest" });
}

async function follow(answer, mode, body, signal) {
  let ending = "";
  let usage = null;
  for await (const part of complete(mode, body, signal)) {
    const stay = atEnd(answer);
    answer.push(part);
    experts.light(part.routes);
    if (marked) answer.mark(marked);
    answer.showFacts();
    if (stay) toEnd(answer);
    if (part.finish) ending = ENDINGS[part.finish] ?? part.finish;
    usage = part.usage ?? usage;
  }
  return { ending, usage };
}

async function ask(text) {
  const mode = byId("chat").checked ? "chat" : "completion";
  const body = { model, ...settings() };
  const asked = { role: "user", content: text };
  if (mode === "chat") body.messages = [...messages, asked];
  else body.prompt = text;
  const answer = new Answer(look, mode === "chat" ? "" : text);
  const turns = mode === "chat" ? [said("You", text), answer.turn] : [answer.turn];
  answers.push(answer);
  byId("hint").hidden = true;
  log.append(...turns);
  toEnd(answer);
  const controller = new AbortController();
  busy(controller);
  let ending = "";
  let usage = null;
  try {
    ({ ending, usage } = await follow(answer, mode, body, controller.signal));
  } catch (error) {
    ending = controller.signal.aborted ? "stopped" : "failed";
    if (!controller.signal.aborted) report(error);
    if (!answer.text) prompt.value ||= text;
  }
  answer.finish(ending, usage);
  byId("status").textContent = `Answer: ${answer.facts.textContent}`;
  if (mode === "chat" && answer.text) messages.push(asked, { role: "assistant", content: answer.text });
  else if (!answer.text && ending === "failed") {
    turns.forEach((turn) => turn.remove());
    answers = answers.filter((other) => other !== answer);
  }
  if (running === controller) busy(null);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (!text.trim() || running) return;
  report(null);
  prompt.value = "";
  ask(text).catch((error) => {
    prompt.value ||= text;
    report(error);
  });
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});

stop.addEventListener("click", () => {
  running?.abort();
  prompt.focus();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

byId("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  answers.forEach((answer) => answer.turn.remove());
  log.querySelectorAll(".turn").forEach((turn) => turn.remove());
  answers = [];
  marked = null;
  byId("hint").hidden = false;
  report(null);
  experts.clear();
  prompt.focus();
});

try {
  const told = await about();
  model = await modelName();
  byId("model").textContent = model;
  if (told.experts) experts.shape(told.experts, told.top_k);
  if (told.max_model_len) byId("max_tokens").max = told.max_model_len;
  if (told.chat === false) {
    byId("chat").disabled = true;
    byId("completion").checked = true;
    byId("note").hidden = false;
  }
} catch (error) {
  report(new Error(`The server does not answer: ${error.message}`));
}
