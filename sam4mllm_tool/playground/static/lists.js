// The lists next to the picture: objects, relations, calls.

import { describe } from "./stage.js";

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

export function drawObjects(place, objects, current, ticked, actions) {
  const focusedKey = document.activeElement?.dataset?.key;
  const fresh = row({ number: 0, panel: "a", name: "New object" }, current, ticked, actions);
  place.replaceChildren(...objects.map((one) => row(one, current, ticked, actions)), fresh);
  if (focusedKey) place.querySelector(`[data-key="${focusedKey}"]`)?.focus();
}

function row(one, current, ticked, actions) {
  const chosen = one.number === current.number && one.panel === current.panel;
  const entry = element("div", { className: chosen ? "object chosen" : "object" });
  const radio = element("input", { type: "radio", name: "current", checked: chosen });
  radio.dataset.key = `choose ${one.panel}${one.number}`;
  radio.addEventListener("change", () => actions.choose(one.number ? one : null));
  const swatch = element("span", { className: "swatch", textContent: one.number || "+" });
  if (one.colour) Object.assign(swatch.style, { background: one.colour, color: one.ink });
  const name = element("span", { className: "name", textContent: one.name });
  const head = element("div", { className: "head" }, element("label", {}, radio, swatch, name));
  entry.append(head);
  if (!one.number) return entry;
  entry.dataset.object = one.object_id;
  const tick = element("input", { type: "checkbox", checked: ticked.has(one.object_id), disabled: !one.mask });
  tick.dataset.key = `tick ${one.panel}${one.number}`;
  tick.setAttribute("aria-label", `Tick object ${one.number}`);
  tick.title = "Tick objects to compare or combine them";
  tick.addEventListener("change", () => (tick.checked ? ticked.add(one.object_id) : ticked.delete(one.object_id)));
  head.append(tick);
  entry.append(element("p", { className: "quiet", textContent: details(one) }));
  if (chosen) entry.append(buttons(one, actions), pointList(one));
  return entry;
}

function details(one) {
  const parts = [one.object_id];
  if (one.panel === "b") parts.push("side B");
  if (one.strategy) parts.push(one.strategy);
  if (one.score !== null) parts.push(`score ${one.score.toFixed(2)}`);
  parts.push(one.area === null ? "no mask yet" : `${one.area} pixels`);
  if (one.predicted_iou !== null) parts.push(`predicted IoU ${one.predicted_iou.toFixed(2)}`);
  return parts.join(" · ");
}

function buttons(one, actions) {
  const group = element("div", { className: "buttons" });
  const add = (text, title, action, disabled = false) => {
    const button = element("button", { type: "button", className: "small", textContent: text, title, disabled });
    button.dataset.key = `${text} ${one.panel}${one.number}`;
    button.addEventListener("click", () => action(one));
    group.append(button);
  };
  add("Ask about a grid", "Ask about points spread evenly over the box", actions.ask, !one.can_be_asked);
  add(one.mask ? "Refine" : "Draw the mask", "Draw the mask from the box and all answered points", actions.redraw);
  add("Remove", "Remove it from the page", actions.remove);
  return group;
}

function pointList(one) {
  const list = element("details", {}, element("summary", { textContent: `${one.points.length} points` }));
  list.append(element("ul", {}, ...one.points.map((point) => element("li", { textContent: describe(point) }))));
  list.hidden = !one.points.length;
  return list;
}

export function drawRelations(place, relations, objects) {
  const name = (id) => {
    const one = objects.find((each) => each.object_id === id);
    return one ? `${one.number}${one.panel === "b" ? " (B)" : ""}` : id;
  };
  place.replaceChildren(...relations.map((pair) => {
    const [a, b] = [name(pair.a), name(pair.b)];
    const where = pair.position.filter((side) => side !== "overlapping").map((side) => side.replace("_", " ")).join(" and ");
    const relation = pair.position.includes("overlapping") || !where ? `${a} overlaps ${b}` : `${a} is ${where} ${b}`;
    const share = (value) => `${Math.round(100 * value)} %`;
    const gap = pair.distance ? `, ${pair.distance} pixels apart` : "";
    const text = `${relation}${gap}: IoU ${pair.iou.toFixed(3)}; ${share(pair.a_inside_b)} of ${a} lies in ${b}, ${share(pair.b_inside_a)} of ${b} in ${a}.`;
    return element("li", { textContent: text });
  }));
}

export function drawCalls(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

export function drawReplies(place, steps) {
  place.replaceChildren(...steps.map((step) => element("li", {},
    element("code", { textContent: step.tool }),
    element("span", { className: "quiet", textContent: ` ${step.seconds.toFixed(2)} s` }),
    element("p", { textContent: step.result.text }))));
}
