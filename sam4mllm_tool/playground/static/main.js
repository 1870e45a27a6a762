// The page: draws the state that the server sends, and turns clicks into tool calls.

import * as api from "./api.js";
import { drawCalls, drawObjects, drawRelations, drawReplies } from "./lists.js";
import { Settings } from "./settings.js";
import { describe, Stage } from "./stage.js";

const STAGES = {
  waiting: "Waiting for the models …",
  locate: "Looking for the object …",
  verify: "Comparing boxes …",
  points: "Asking about points …",
  "image embedding": "Preparing the picture …",
  mask: "Drawing the mask …",
};
const $ = (id) => document.getElementById(id);

let about, offers, state;
let running = null; // AbortController of the call in progress
let current = { panel: "a", number: 0 }; // the selected object; number 0 stands for a new one
const ticked = new Set();
const stages = {};
const settings = {};

// -- drawing ----------------------------------------------------------------------------------

const form = () => document.querySelector("input[name=form]:checked").value;
const tool = () => document.querySelector("input[name=tool]:checked").value;
const objectsOf = (panel) => state.objects.filter((one) => one.panel === panel);
const find = ({ panel, number }) => objectsOf(panel).find((one) => one.number === number) ?? null;

function currentOf(panel) {
  return current.panel === panel ? find(current) : objectsOf(panel).at(-1) ?? null;
}

function draw() {
  if (!state) return;
  const { picture } = state;
  const two = $("compare").checked || objectsOf("b").length > 0;
  $("panels").classList.toggle("two", two);
  $("panels").classList.toggle("empty", !picture);
  for (const panel of ["a", "b"]) {
    const stage = stages[panel];
    stage.figure.hidden = !picture || (panel === "b" && !two);
    stage.tool = tool();
    if (picture) stage.show(picture, objectsOf(panel), currentOf(panel), two ? caption(panel) : "");
    stage.root.dataset.tool = tool();
  }
  const chosen = find(current);
  if (!chosen) current.number = 0;
  drawObjects($("objects"), state.objects, current, ticked, { choose, remove, ask: askGrid, redraw });
  drawRelations($("relations"), state.relations, state.objects);
  drawCalls($("code"), state[form()]);
  drawReplies($("replies"), state.steps);
  $("no-calls").hidden = state.steps.length > 0;
  for (const id of ["reply-list", "code", "code-form"]) $(id).hidden = !state.steps.length;
  drawSaving(two);
  drawSuggestions();
  $("relate").hidden = state.objects.length < 2;
  $("undo").disabled = !state.can_undo || Boolean(running);
  $("clear").disabled = !state.objects.length || Boolean(running);
  const isScene = picture && offers.some((one) => one.kind === "scene" && one.name === picture.name);
  $("caution").classList.toggle("warm", Boolean(picture) && !isScene);
}

function caption(panel) {
  const names = objectsOf(panel).map((one) => one.strategy).filter(Boolean);
  const name = names.at(-1) ?? settings[panel].value.strategy;
  return `${panel.toUpperCase()}: ${name}`;
}

function drawSaving(two) {
  const links = [];
  const one = find(current);
  for (const panel of two ? ["a", "b"] : ["a"]) {
    if (!objectsOf(panel).some((each) => each.mask)) continue;
    const which = two ? ` ${panel.toUpperCase()}` : "";
    links.push([`Overlay${which} (PNG)`, `overlay.png?panel=${panel}`], [`COCO${which} (JSON)`, `coco.json?panel=${panel}`]);
  }
  if (one?.mask) links.push([`Mask ${one.number} (PNG)`, `${one.object_id}.png`]);
  if (one?.has_trace) links.push([`Trace ${one.number} (page)`, `${one.object_id}.html`], [`Trace ${one.number} (JSON)`, `${one.object_id}.json`]);
  if (state.picture) links.push(["Picture", "picture.png"]);
  if (state.steps.length) links.push(["Calls (JSON)", "calls.json"], ["Calls (Python)", "calls.py"]);
  $("save").hidden = !links.length;
  $("save-links").replaceChildren(...links.map(([text, file]) => {
    const link = document.createElement("a");
    link.className = "button small";
    link.href = `/save/${file}`;
    link.download = "";
    link.textContent = text;
    return link;
  }));
}

function drawSuggestions() {
  const offer = offers.find((one) => one.name === state.picture?.name);
  const texts = offer?.expressions ?? [];
  if ($("suggestions").dataset.texts === texts.join("|")) return;
  $("suggestions").dataset.texts = texts.join("|");
  $("suggestions").replaceChildren(...texts.map((text) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.textContent = text;
    chip.addEventListener("click", () => { $("expression").value = text; $("expression").focus(); });
    return chip;
  }));
}

function drawGallery() {
  $("gallery").replaceChildren(...offers.map((offer, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = offer.name;
    const picture = new Image(72, 72);
    picture.loading = "lazy";
    picture.src = `/thumbnails/${number}`;
    picture.alt = offer.name;
    button.append(picture);
    button.addEventListener("click", () => openPicture(() => api.post("/choose", { name: String(number) })));
    return button;
  }));
}

function capitalised(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

// -- actions ------------------------------------------------------------------------------------

function showStatus(text, busy = false) {
  $("status").textContent = text;
  $("bar").hidden = !busy;
  document.body.classList.toggle("busy", busy);
}

function showProblem(place, error) {
  const box = $(`${place}-problem`);
  box.replaceChildren();
  if (!error) return;
  const message = document.createElement("p");
  message.textContent = error.message;
  const hint = document.createElement("p");
  hint.className = "quiet";
  hint.textContent = error.hint ?? "";
  box.append(message, hint);
  box.scrollIntoView({ block: "nearest" });
}

function clearProblems() {
  for (const place of ["picture", "question", "stage", "objects"]) showProblem(place, null);
}

// Runs `work` if nothing else is running; an error is shown at `place`.
async function attempt(place, work) {
  if (running) return;
  running = new AbortController();
  clearProblems();
  $("cancel").hidden = false;
  draw();
  try {
    await work(running.signal);
  } catch (error) {
    if (error.name === "AbortError") showStatus("Cancelled.");
    else {
      showStatus("");
      showProblem(place, error);
      if (!(error instanceof api.Problem)) console.error(error);
    }
  } finally {
    running = null;
    $("cancel").hidden = true;
    $("bar").hidden = true;
    document.body.classList.remove("busy");
    for (const stage of Object.values(stages)) stage.preview = { boxes: [], points: [] };
    draw();
  }
}

function openPicture(request) {
  return attempt("picture", async () => {
    showStatus("Opening the picture …", true);
    state = await request();
    current = { panel: "a", number: 0 };
    ticked.clear();
    showNotes(state.picture.notes);
    showStatus(`${state.picture.name}: ${state.picture.width} × ${state.picture.height} pixels.`);
  });
}

function openFile(file) {
  if (file) openPicture(() => api.upload(file));
}

function showNotes(notes) {
  const shown = notes.filter((note) => note !== about.caution);
  $("notes").replaceChildren(...shown.map((note) => {
    const item = document.createElement("li");
    item.textContent = `Note: ${note}.`;
    return item;
  }));
}

// Runs a tool call for a panel and draws its events as they arrive.
async function call(name, args, panel, signal) {
  const stage = stages[panel];
  const before = new Set(state.objects.map((one) => one.object_id));
  stage.preview = { boxes: [], points: [] };
  const event = await api.call(name, args, panel, (intermediate) => preview(stage, intermediate), signal);
  stage.preview = { boxes: [], points: [] };
  state = event.state;
  showNotes(event.result.notes);
  const created = state.objects.filter((one) => !before.has(one.object_id));
  if (created.length) current = { panel, number: created.at(-1).number };
  return { result: event.result, created };
}

function preview(stage, event) {
  const { boxes, points } = stage.preview;
  if (event.event === "stage") showStatus(STAGES[event.name] ?? `${event.name} …`, true);
  if (event.event === "boxes") boxes.push(...event.boxes);
  if (event.event === "asking") points.push(...event.points);
  if (event.event === "answers") {
    const answered = new Map(event.points.map((one) => [`${one.x} ${one.y}`, one]));
    const pending = points.filter((one) => !answered.has(`${one.x} ${one.y}`));
    stage.preview.points = [...pending, ...event.points];
  }
  stage.draw();
}

function needPicture() {
  if (!state.picture) throw new api.Problem({ message: "There is no picture yet.", hint: "Choose one above, or drop one on the page." });
}

function needExpression() {
  const text = $("expression").value.trim();
  if (text) return text;
  $("expression").focus();
  throw new api.Problem({ message: "What should be found?", hint: "Describe the object, such as “the red apple”." });
}

function question() {
  const args = { image: state.picture.image_id, expression: needExpression() };
  if ($("count").value !== "0+") args.count = $("count").value;
  return args;
}

function segment() {
  return attempt("question", async (signal) => {
    needPicture();
    const args = question();
    if (matchMedia("(max-width: 48rem)").matches) $("stages").scrollIntoView();
    const panels = $("compare").checked ? ["a", "b"] : ["a"];
    const replies = [];
    for (const panel of panels) {
      replies.push(await call("segment_object", { ...args, ...settings[panel].arguments() }, panel, signal));
      draw();
    }
    current = { panel: "a", number: replies[0].created.at(-1)?.number ?? 0 };
    if (panels.length === 2) await compareSides(replies, signal);
    else showStatus(summary(replies[0]));
  });
}

// Reports how much the two sides of a comparison overlap.
async function compareSides([a, b], signal) {
  if (!a.created.length || !b.created.length) {
    showStatus(`A: ${summary(a)} B: ${summary(b)}`);
    return;
  }
  const pair = [a.created[0].object_id, b.created[0].object_id];
  const { result } = await call("compare_objects", { object_ids: pair }, "a", signal);
  const share = (100 * result.pairs[0].iou).toFixed(1);
  showStatus(`A and B overlap by ${share} % (IoU of their first objects). A: ${summary(a)} B: ${summary(b)}`);
}

function locate() {
  return attempt("question", async (signal) => {
    needPicture();
    showStatus(summary(await call("locate_object", question(), "a", signal)));
  });
}

// One sentence per created object, or the reason why there is none.
function summary({ result, created }) {
  if (result.status === "not_found") return "The model says that nothing in the picture matches.";
  if (!created.length) return result.text;
  return created.map((one) => {
    const area = one.area === null ? "a box" : `${one.area} pixels`;
    return `${one.number}: ${one.name}, ${area}.`;
  }).join(" ");
}

function act(panel, action) {
  const one = currentOf(panel);
  const isNew = current.number === 0 && current.panel === "a" && panel === "a";
  const target = isNew ? null : one;
  if (tool() === "select") return selectAt(panel, action);
  return attempt("stage", async (signal) => {
    const subject = target ? { object_id: target.object_id } : { image: state.picture.image_id };
    if (action.kind === "box") return drawFrom({ ...subject, box: action.box }, panel, signal);
    const { x, y } = action;
    if (tool() === "ask") return askPoint(target, { x, y }, panel, signal);
    return drawFrom({ ...subject, points: [{ x, y, label: tool() }] }, panel, signal);
  });
}

async function drawFrom(args, panel, signal) {
  showStatus(summary(await call("segment_with_prompts", args, panel, signal)));
}

async function askPoint(one, point, panel, signal) {
  let args = { points: [point], ...settings[panel].thresholds() };
  if (one) {
    if (!one.can_be_asked) {
      throw new api.Problem({ message: "This object was not found by an expression, so there is nothing to ask the model.", hint: "Choose another object, or “New object” with an expression." });
    }
    args = { object_id: one.object_id, ...args };
  } else {
    args = { image: state.picture.image_id, expression: needExpression(), ...args };
  }
  const { result } = await call("is_point_inside_object", args, panel, signal);
  showAnswers(result.points);
}

function showAnswers(points) {
  if (!points.length) return showStatus("The model says that nothing in the picture matches.");
  const labels = { inside: "foreground", outside: "background", undecided: "undecided" };
  const first = points[0];
  if (points.length === 1) {
    const clash = first.disagrees ? " The answer contradicts the mask." : "";
    return showStatus(`${describe({ ...first, label: labels[first.answer] })}.${clash}`);
  }
  const count = (answer) => points.filter((one) => one.answer === answer).length;
  showStatus(`${points.length} points asked: ${count("inside")} inside, ${count("outside")} outside, ${count("undecided")} undecided.`);
}

function selectAt(panel, { x, y }) {
  const hit = objectsOf(panel).filter(({ box }) => box[0] <= x && x < box[2] && box[1] <= y && y < box[3]);
  const size = ({ box }) => (box[2] - box[0]) * (box[3] - box[1]);
  const [one] = hit.sort((a, b) => size(a) - size(b));
  if (one) choose(one);
}

function choose(one) {
  current = one ? { panel: one.panel, number: one.number } : { panel: "a", number: 0 };
  draw();
}

function askGrid(one) {
  return attempt("objects", async (signal) => {
    const args = { object_id: one.object_id, ...settings[one.panel].thresholds() };
    const { result } = await call("is_point_inside_object", args, one.panel, signal);
    showAnswers(result.points);
  });
}

function redraw(one) {
  return attempt("objects", (signal) => drawFrom({ object_id: one.object_id }, one.panel, signal));
}

function change(path, place, text, value = {}) {
  return attempt(place, async () => {
    state = await api.post(path, value);
    showStatus(text);
  });
}

function remove(one) {
  ticked.delete(one.object_id);
  return change("/remove", "objects", `Removed ${one.number}: ${one.name}.`, { name: one.object_id });
}

function undo() {
  if (state?.can_undo) return change("/undo", "stage", "Undone.");
}

function relate(combine) {
  return attempt("objects", async (signal) => {
    const ids = state.objects.map((one) => one.object_id).filter((id) => ticked.has(id));
    if (ids.length < 2) throw new api.Problem({ message: "Tick two or more objects first." });
    const args = combine ? { object_ids: ids, combine } : { object_ids: ids };
    const { created } = await call("compare_objects", args, "a", signal);
    showStatus(created.length ? summary({ result: {}, created }) : "Compared: the result is listed below the objects.");
  });
}

// -- wiring -------------------------------------------------------------------------------------

function wire() {
  for (const name of ["file", "camera"]) {
    $(name).addEventListener("change", () => { openFile($(name).files[0]); $(name).value = ""; });
  }
  document.addEventListener("paste", (event) => openFile(event.clipboardData?.files[0]));
  document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    openFile(event.dataTransfer?.files[0]);
  });
  $("address-form").addEventListener("submit", (event) => {
    event.preventDefault();
    openPicture(() => api.post("/open", { name: $("address").value }));
  });
  $("question").addEventListener("submit", (event) => { event.preventDefault(); segment(); });
  $("locate").addEventListener("click", locate);
  $("cancel").addEventListener("click", () => running?.abort());
  $("compare").addEventListener("change", () => {
    settings.b.fieldset.hidden = !$("compare").checked;
    draw();
  });
  $("undo").addEventListener("click", undo);
  $("clear").addEventListener("click", () => { ticked.clear(); change("/clear", "stage", "Cleared."); });
  for (const button of document.querySelectorAll("[data-combine]")) {
    button.addEventListener("click", () => relate(button.dataset.combine));
  }
  for (const input of document.querySelectorAll("input[name=tool], input[name=form]")) input.addEventListener("change", draw);
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input:not([type=radio], [type=checkbox], [type=range]), textarea");
    if (event.key === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !typing) {
      event.preventDefault();
      undo();
    }
  });
  $("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = localStorage.getItem("theme") ?? (dark ? "dark" : "light");
    localStorage.setItem("theme", now === "dark" ? "light" : "dark");
    applyTheme();
  });
}

function applyTheme() {
  document.documentElement.style.colorScheme = localStorage.getItem("theme") ?? "light dark";
}

async function copy(button) {
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    showStatus("Copied.");
  } catch {
    getSelection().selectAllChildren(source);
    showStatus("Selected: copy it with Ctrl+C.");
  }
}

async function start() {
  applyTheme();
  for (const panel of ["a", "b"]) {
    stages[panel] = new Stage(panel, (action) => act(panel, action));
    $("panels").append(stages[panel].figure);
  }
  try {
    const common = await api.get("/settings");
    ({ about, offers } = common);
    for (const panel of ["a", "b"]) {
      settings[panel] = new Settings(document.querySelector(`.settings[data-panel=${panel}]`), common, draw);
    }
    settings.b.choose("box_only");
    $("models").textContent = `MLLM: ${about.mllm} · segmenter: ${about.segmenter}`;
    $("caution").hidden = !about.caution;
    $("caution-text").textContent = capitalised(`${about.caution.split(";")[0]}.`);
    $("caution-command").textContent = about.command;
    $("address-form").hidden = !common.network;
    wire();
    drawGallery();
    state = await api.get("/state");
    draw();
    document.body.dataset.ready = "yes";
  } catch (error) {
    showProblem("stage", error);
  }
}

start();
