// The dialogue settings of one side of a comparison: strategy, number of points, thresholds.

const ASK_NO_POINTS = ["ppg", "box_only"];

export class Settings {
  constructor(fieldset, defaults, changed) {
    this.fieldset = fieldset;
    this.defaults = defaults;
    const legend = document.createElement("legend");
    legend.textContent = fieldset.dataset.panel === "a" ? "Dialogue settings" : "B: dialogue settings";
    this.strategy = document.createElement("select");
    for (const name of Object.keys(defaults.strategies)) this.strategy.add(new Option(name));
    this.about = document.createElement("p");
    this.about.className = "quiet";
    this.points = number({ min: 1, max: 100, step: 1, value: defaults.points });
    this.inside = number({ min: 0, max: 1, step: 0.05, value: defaults.p_yes_above });
    this.outside = number({ min: 0, max: 1, step: 0.05, value: defaults.p_no_above });
    this.strategy.value = defaults.strategy;
    fieldset.append(
      legend,
      labelled("Strategy", this.strategy),
      this.about,
      labelled("Points to ask about", this.points),
      labelled("Inside if p_yes is above", this.inside),
      labelled("Outside if p_no is above", this.outside),
    );
    fieldset.addEventListener("change", () => { this.fit(); changed(); });
    this.fit();
  }

  choose(strategy) {
    this.strategy.value = strategy;
    this.fit();
  }

  // Disables the settings that the strategy does not use.
  fit() {
    const { strategy } = this.value;
    this.about.textContent = this.defaults.strategies[strategy];
    for (const input of [this.points, this.inside, this.outside]) input.disabled = ASK_NO_POINTS.includes(strategy);
  }

  get value() {
    return { strategy: this.strategy.value };
  }

  // Arguments for segment_object: the strategy, and settings that differ from the defaults.
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

function labelled(text, input) {
  const label = document.createElement("label");
  label.className = "line";
  label.append(text, input);
  return label;
}
