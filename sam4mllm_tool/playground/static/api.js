// Requests to the server. Every failure becomes a Problem with a message and a hint.

export class Problem extends Error {
  constructor({ message, hint = "", kind = "" }) {
    super(message);
    this.hint = hint;
    this.kind = kind;
  }
}

async function checked(request) {
  let response;
  try {
    response = await request;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ message: "The playground does not answer.", hint: "Is it still running?" });
  }
  if (response.ok) return response;
  const text = await response.text();
  let details = { message: text || response.statusText };
  try { details = JSON.parse(text); } catch { /* plain text */ }
  throw new Problem(details);
}

export async function get(path) {
  return (await checked(fetch(path))).json();
}

export async function post(path, value = {}) {
  const body = JSON.stringify(value);
  const headers = { "content-type": "application/json" };
  return (await checked(fetch(path, { method: "POST", body, headers }))).json();
}

export async function upload(file) {
  const path = `/upload?name=${encodeURIComponent(file.name || "pasted.png")}`;
  return (await checked(fetch(path, { method: "POST", body: file }))).json();
}

// Runs a tool call; `onEvent` is called with each intermediate event. Returns the final one.
export async function call(tool, args, panel, onEvent, signal) {
  const body = JSON.stringify({ tool, arguments: args, panel });
  const headers = { "content-type": "application/json" };
  const response = await checked(fetch("/call", { method: "POST", body, headers, signal }));
  for await (const event of lines(response.body)) {
    if (event.event === "error") throw new Problem(event);
    if (event.event === "state") return event;
    onEvent(event);
  }
  throw new Problem({ message: "The connection was lost during the call.", hint: "Try again." });
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
