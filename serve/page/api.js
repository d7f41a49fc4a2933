// Talks to the server: what it serves, and answers as they come.

/** What the page should know of the model; {} where the server does not say. */
export async function about() {
  const reply = await fetch("page/about.json", { cache: "no-store" });
  return reply.ok ? reply.json() : {};
}

/** What requests call the model. */
export async function modelName() {
  const reply = await fetch("v1/models", { cache: "no-store" });
  if (!reply.ok) throw new Error(await reason(reply));
  return (await reply.json()).data[0].id;
}

/** One sentence out of an error's body, whatever its shape. */
async function reason(reply) {
  const text = await reply.text();
  try {
    const told = JSON.parse(text).error.message;
    if (typeof told === "string") return told;
  } catch {
    // Not OpenAI's shape: the text itself, or the status.
  }
  return text.slice(0, 300) || `The server answered ${reply.status}.`;
}

/** The data of each event of a text/event-stream body. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Asks for an answer and yields it as it comes: {text, routes, finish, usage}.
 * routes: for each of the new tokens, for each MoE layer, the experts' numbers.
 */
export async function* complete(mode, body, signal) {
  const path = mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const reply = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true }, routes: true }),
    signal,
  });
  if (!reply.ok) throw new Error(await reason(reply));
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message ?? "The server could not go on.");
    const choice = chunk.choices?.[0];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? "",
      routes: choice?.routes ?? [],
      finish: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  }
  throw new Error("The connection ended before the answer did.");
}
