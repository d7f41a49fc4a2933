// One turn of the conversation. Text of people and models goes in as text nodes, never as markup.

function element(name, classes, text) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Someone's words, as they are. */
export function said(who, text) {
  const turn = element("article", "turn user");
  turn.append(element("p", "who", who), element("p", "text", text));
  return turn;
}

/** An answer that grows. Each token can be pointed at, clicked, or reached with the arrow keys. */
export class Answer {
  /**
   * @param onLook called with {text, routes} of the token looked at, or null.
   * @param given the text that a completion goes on from.
   */
  constructor(onLook, given = "") {
    this.tokens = [];
    this.text = "";
    this.count = 0;
    this.chosen = -1;
    this.started = performance.now();
    this.first = this.last = null;
    this.onLook = onLook;
    this.waiting = []; // routes of tokens whose text is still held back
    this.body = element("p", "text");
    this.facts = element("p", "facts");
    this.turn = element("article", "turn answer working");
    this.turn.append(element("p", "who", "Model"), this.body, this.facts);
    if (given) this.body.append(element("span", "given", given));
    this.body.tabIndex = 0;
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", "Answer. Arrow keys walk through its tokens.");
    this.body.addEventListener("pointerover", (event) => this.point(event.target));
    this.body.addEventListener("pointerleave", () => this.onLook(this.tokens[this.chosen] ?? null));
    this.body.addEventListener("click", (event) => this.choose(this.indexOf(event.target), true));
    this.body.addEventListener("keydown", (event) => this.key(event));
  }

  /** New text and the routes of the tokens behind it. */
  push({ text, routes }, now = performance.now()) {
    if (routes.length || text) {
      this.first ??= now;
      this.last = now;
    }
    this.count += routes.length;
    this.waiting.push(...routes);
    if (!text) return;
    const span = element("span", "token", text);
    span.dataset.index = this.tokens.length;
    this.tokens.push({ text, routes: this.waiting, span });
    this.waiting = [];
    this.text += text;
    this.body.append(span);
  }

  /** Tokens a second after the first one; null before there are two. */
  get rate() {
    return this.count > 1 && this.last > this.first ? ((this.count - 1) * 1000) / (this.last - this.first) : null;
  }

  showFacts(ending = "") {
    const facts = [`${this.count} token${this.count === 1 ? "" : "s"}`];
    if (this.first !== null) facts.push(`first after ${((this.first - this.started) / 1000).toFixed(2)} s`);
    if (this.rate !== null) facts.push(`${this.rate.toFixed(1)} tokens/s`);
    if (ending) facts.push(ending);
    this.facts.textContent = facts.join(" · ");
  }

  finish(ending, usage) {
    if (usage?.completion_tokens) this.count = usage.completion_tokens;
    this.turn.classList.remove("working");
    this.showFacts(ending);
  }

  indexOf(target) {
    const index = target.closest?.(".token")?.dataset.index;
    return index === undefined ? -1 : Number(index);
  }

  point(target) {
    const index = this.indexOf(target);
    if (index >= 0) this.onLook(this.tokens[index]);
  }

  /** Keeps a token in view; a second click lets it go. */
  choose(index, toggles = false) {
    this.tokens[this.chosen]?.span.classList.remove("chosen");
    this.chosen = toggles && index === this.chosen ? -1 : index;
    const token = this.tokens[this.chosen] ?? null;
    token?.span.classList.add("chosen");
    token?.span.scrollIntoView({ block: "nearest" });
    this.onLook(token, this);
  }

  key(event) {
    const last = this.tokens.length - 1;
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") this.choose(-1);
    else if (event.key in steps && last >= 0 && !event.altKey && !event.ctrlKey && !event.metaKey) {
      const from = this.chosen < 0 && steps[event.key] < 0 ? last + 1 : this.chosen;
      this.choose(Math.min(last, Math.max(0, from + steps[event.key])));
    } else return;
    event.preventDefault();
  }

  /** Marks the tokens that used one expert of one layer; null: none. */
  mark(cell) {
    for (const token of this.tokens) {
      const used = cell && token.routes.some((layers) => layers[cell.layer]?.includes(cell.expert));
      token.span.classList.toggle("match", Boolean(used));
    }
  }
}
