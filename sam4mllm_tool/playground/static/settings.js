// How one side of a comparison is asked: strategy, number of points, thresholds.

const STRATEGIES = {
  pqpp: "pqpp: a box, then points spread over it",
  ppg: "ppg: box and points in one reply",
  adaptive: "adaptive: points where the mask is unsure",
  box_only: "box_only: no points",
};

export class Settings {
  constructor(fieldset, defaults, changed) {
    this.fieldset = fieldset;
    this.defaults = defaults;
    const legend = document.createElement("legend");
    legend.textContent = fieldset.dataset.panel === "a" ? "How it is asked" : "B: how it is asked";
    this.strategy = document.createElement("select");
    for (const [name, text] of Object.entries(STRATEGIES)) this.strategy.add(new Option(text, name));
    this.points = number({ min: 1, max: 100, step: 1, value: defaults.points });
    this.inside = number({ min: 0, max: 1, step: 0.05, value: defaults.p_yes_above });
    this.outside = number({ min: 0, max: 1, step: 0.05, value: defaults.p_no_above });
    this.strategy.value = defaults.strategy;
    fieldset.append(
      legend,
      labelled("Strategy", this.strategy, "column"),
      labelled("Points to ask about", this.points),
      labelled("Inside above p_yes", this.inside),
      labelled("Outside above p_no", this.outside),
    );
    fieldset.addEventListener("change", () => { this.fit(); changed(); });
    this.fit();
  }

  choose(strategy) {
    this.strategy.value = strategy;
    this.fit();
  }

  // What the strategy does not use is disabled.
  fit() {
    const { strategy } = this.value;
    const asks = strategy === "pqpp" || strategy === "adaptive";
    for (const input of [this.points, this.inside, this.outside]) input.disabled = !asks;
  }

  get value() {
    return { strategy: this.strategy.value };
  }

  // Arguments of segment_object: the strategy, and what differs from the defaults.
  arguments() {
    const args = { strategy: this.strategy.value };
    if (!this.points.disabled && this.points.value && this.points.valueAsNumber !== this.defaults.points) args.points = this.points.valueAsNumber;
    return { ...args, ...(this.inside.disabled ? {} : this.thresholds()) };
  }

  thresholds() {
    const args = {};
    if (this.inside.value && this.inside.valueAsNumber !== this.defaults.p_yes_above) args.p_yes_above = this.inside.valueAsNumber;
    if (this.outside.value && this.outside.valueAsNumber !== this.defaults.p_no_above) args.p_no_above = this.outside.valueAsNumber;
    return args;
  }
}

function number(attributes) {
  const input = document.createElement("input");
  input.type = "number";
  Object.assign(input, attributes);
  return input;
}

function labelled(text, input, kind = "line") {
  const label = document.createElement("label");
  label.className = kind;
  label.append(text, input);
  return label;
}
