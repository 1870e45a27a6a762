// One picture with its masks, boxes and points. All coordinates are pixels of the original picture:
// the SVG's viewBox has the picture's size, at whatever size the picture is displayed.

const SVG = "http://www.w3.org/2000/svg";
const NEAR = 14; // distance in CSS pixels within which a press grabs a corner
const RADIUS = 6;

function shape(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent?.append(node);
  return node;
}

export class Stage {
  // `act` is called with {kind: "point", x, y} or {kind: "box", box}, by pointer or keyboard.
  constructor(panel, act) {
    this.panel = panel;
    this.act = act;
    this.tool = "select";
    this.picture = null;
    this.objects = [];
    this.current = null;
    this.preview = { boxes: [], points: [] };
    this.figure = document.createElement("figure");
    this.caption = document.createElement("figcaption");
    this.root = document.createElement("div");
    this.root.className = "stage";
    this.root.tabIndex = 0;
    this.root.setAttribute("role", "application");
    this.root.setAttribute("aria-describedby", "stage-help");
    this.image = new Image();
    this.image.alt = "";
    this.image.draggable = false;
    this.masks = document.createElement("div");
    this.masks.className = "masks";
    this.drawing = shape("svg", { "aria-hidden": "true", preserveAspectRatio: "none" });
    this.root.append(this.image, this.masks, this.drawing);
    this.figure.append(this.root, this.caption);
    this.cursor = null; // position of the keyboard's cross-hair
    this.anchor = null; // first corner of the box that is being drawn
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  show(picture, objects, current, caption) {
    if (picture?.address !== this.picture?.address) {
      this.cursor = this.anchor = null;
      this.image.src = picture.address;
      const { style } = this.root;
      style.aspectRatio = `${picture.width} / ${picture.height}`;
      style.setProperty("--ratio", picture.width / picture.height);
      this.drawing.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    }
    this.picture = picture;
    this.objects = objects;
    this.current = current;
    this.caption.textContent = caption;
    this.root.setAttribute("aria-label", `${picture.name}, ${picture.width} by ${picture.height} pixels, ${objects.length} objects`);
    this.drawMasks();
    this.draw();
  }

  drawMasks() {
    const wanted = this.objects.filter((one) => one.mask);
    const known = new Map([...this.masks.children].map((one) => [one.dataset.address, one]));
    this.masks.replaceChildren(...wanted.map((one) => {
      const layer = known.get(one.mask) ?? new Image();
      if (!layer.src) layer.src = one.mask;
      layer.alt = "";
      layer.dataset.address = one.mask;
      layer.dataset.object = one.object_id;
      return layer;
    }));
  }

  // Picture pixels per CSS pixel.
  get unit() {
    return this.picture.width / (this.root.clientWidth || this.picture.width);
  }

  draw() {
    if (!this.picture) return;
    this.drawing.replaceChildren();
    for (const one of this.objects) this.drawObject(one);
    for (const box of this.preview.boxes) this.drawBox(box, "preview");
    for (const point of this.preview.points) this.drawPoint(point);
    if (this.anchor && this.cursor) this.drawBox(ordered(this.anchor, this.cursor), "rubber");
    if (this.cursor) this.drawCursor();
  }

  drawObject(one) {
    const chosen = one === this.current;
    const box = this.drawBox(one.box, chosen ? "current" : "", one.colour);
    box.dataset.object = one.object_id;
    this.drawLabel(one);
    for (const point of one.points) this.drawPoint(point, chosen);
    if (chosen && this.tool === "box") {
      for (const [x, y] of corners(one.box)) {
        const r = 5 * this.unit;
        shape("rect", { class: "handle", x: x - r, y: y - r, width: 2 * r, height: 2 * r }, this.drawing);
      }
    }
  }

  drawBox([x0, y0, x1, y1], kind, colour) {
    const place = { x: x0, y: y0, width: Math.max(0, x1 - x0), height: Math.max(0, y1 - y0) };
    shape("rect", { ...place, class: `halo ${kind}` }, this.drawing);
    const box = shape("rect", { ...place, class: `box ${kind}` }, this.drawing);
    if (colour) box.style.stroke = colour;
    return box;
  }

  drawLabel(one) {
    const u = this.unit;
    const width = (8 + 8 * String(one.number).length) * u;
    const x = Math.min(Math.max(0, one.box[0]), this.picture.width - width);
    const y = Math.min(Math.max(0, one.box[1] - 18 * u), this.picture.height - 18 * u);
    const plate = shape("rect", { x, y, width, height: 18 * u, rx: 3 * u }, this.drawing);
    plate.style.fill = one.colour;
    const text = shape("text", { x: x + width / 2, y: y + 13.5 * u, "font-size": 13 * u, "text-anchor": "middle", class: "label" }, this.drawing);
    text.style.fill = one.ink;
    text.textContent = one.number;
  }

  drawPoint(point, bright = true) {
    const kind = point.label ?? "asking";
    const r = RADIUS * this.unit;
    const { x, y } = point;
    const group = shape("g", { class: `point ${kind}${bright ? "" : " faint"}` }, this.drawing);
    group.dataset.x = x;
    group.dataset.y = y;
    shape("title", {}, group).textContent = describe(point);
    if (point.label && point.p_yes === null) shape("circle", { cx: x, cy: y, r: 1.7 * r, class: "forced" }, group);
    if (kind === "background") {
      const d = `M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}`;
      shape("path", { d, class: "under" }, group);
      shape("path", { d, class: "over" }, group);
    } else if (kind === "undecided") {
      shape("rect", { x: x - 0.8 * r, y: y - 0.8 * r, width: 1.6 * r, height: 1.6 * r }, group);
    } else {
      shape("circle", { cx: x, cy: y, r }, group);
    }
  }

  drawCursor() {
    const { x, y } = this.cursor;
    const { width, height } = this.picture;
    for (const kind of ["halo", "hair"]) {
      shape("path", { d: `M0 ${y}H${width}M${x} 0V${height}`, class: kind }, this.drawing);
    }
  }

  listen() {
    const { root } = this;
    root.addEventListener("pointerdown", (event) => this.press(event));
    root.addEventListener("pointermove", (event) => this.drag(event));
    root.addEventListener("pointerup", (event) => this.release(event));
    root.addEventListener("pointercancel", () => this.cancelDrawing());
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("blur", () => this.cancelDrawing());
  }

  at(event) {
    const area = this.root.getBoundingClientRect();
    const { width, height } = this.picture;
    const x = ((event.clientX - area.left) / area.width) * width;
    const y = ((event.clientY - area.top) / area.height) * height;
    return this.inside(x, y);
  }

  // The nearest position inside the picture, rounded to a tenth of a pixel.
  inside(x, y) {
    const margin = this.tool === "box" ? 0 : 0.1; // a box may end at the picture's edge; a point must lie before it
    const clip = (value, size) => Math.round(10 * Math.min(Math.max(value, 0), size - margin)) / 10;
    return { x: clip(x, this.picture.width), y: clip(y, this.picture.height) };
  }

  press(event) {
    if (!this.picture || event.button) return;
    this.cursor = null;
    if (this.tool !== "box") return;
    const here = this.at(event);
    const grabbed = this.current && corners(this.current.box).find(([x, y]) => Math.hypot(x - here.x, y - here.y) < NEAR * this.unit);
    this.anchor = grabbed ? opposite(this.current.box, grabbed) : here;
    this.root.setPointerCapture(event.pointerId);
    event.preventDefault();
    this.root.focus({ preventScroll: true });
  }

  drag(event) {
    if (!this.anchor || this.tool !== "box" || !event.buttons) return;
    this.cursor = this.at(event);
    this.draw();
  }

  release(event) {
    if (!this.picture || event.button) return;
    const here = this.at(event);
    if (this.tool === "box") this.finishBox(here);
    else this.act({ kind: "point", ...here });
  }

  finishBox(here) {
    const { anchor } = this;
    this.anchor = this.cursor = null;
    this.draw();
    if (!anchor) return;
    const box = ordered(anchor, here);
    const minSide = Math.max(2 * this.unit, 1);
    if (box[2] - box[0] >= minSide && box[3] - box[1] >= minSide) this.act({ kind: "box", box });
  }

  cancelDrawing() {
    this.anchor = this.cursor = null;
    this.draw();
  }

  key(event) {
    if (!this.picture || event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { width, height } = this.picture;
    if (event.key in steps) {
      const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 64));
      const from = this.cursor ?? { x: Math.floor(width / 2) + 0.5, y: Math.floor(height / 2) + 0.5 };
      const [dx, dy] = steps[event.key];
      this.cursor = this.cursor ? this.inside(from.x + dx * step, from.y + dy * step) : from;
      this.draw();
    } else if (event.key === "Enter" || event.key === " ") {
      this.enter();
    } else if (event.key === "Escape") {
      this.cancelDrawing();
    } else {
      return;
    }
    event.preventDefault();
  }

  enter() {
    const here = this.cursor;
    if (!here) return;
    if (this.tool !== "box") this.act({ kind: "point", ...here });
    else if (this.anchor) this.finishBox(here);
    else {
      this.anchor = here;
      this.draw();
    }
  }
}

export function describe(point) {
  const place = `(${round(point.x)}, ${round(point.y)})`;
  if (!point.label) return `${place}: waiting for the answer`;
  const answer = { foreground: "inside", background: "outside", undecided: "undecided" }[point.label];
  const parts = [`${place}: ${answer}`];
  if (point.p_yes === null) parts.push("set by hand");
  else parts.push(`p_yes ${point.p_yes.toFixed(2)}`, `p_no ${point.p_no.toFixed(2)}`);
  if (typeof point.in_mask === "boolean") parts.push(point.in_mask ? "inside the mask" : "outside the mask");
  return parts.join(", ");
}

export function round(value) {
  return Math.round(10 * value) / 10;
}

function ordered(a, b) {
  return [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)].map(round);
}

function corners([x0, y0, x1, y1]) {
  return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
}

function opposite([x0, y0, x1, y1], [x, y]) {
  return { x: x === x0 ? x1 : x0, y: y === y0 ? y1 : y0 };
}
