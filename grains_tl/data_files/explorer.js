"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const menus = ["prompt", "vector", "layer"];
  let state = data.start.slice(); // prompt, vector, layer, alpha

  const number = (x, digits = 3) => x === null ? "\u2013" : x.toFixed(digits).replace("-", "\u2212");
  const signed = (x, digits = 2) => x === null ? "\u2013" : (x < 0 ? "" : "+") + number(x, digits);
  const alpha = (x) => (x > 0 ? "+" : "") + String(x).replace("-", "\u2212");

  function made(tag, text, parent) {
    const element = document.createElement(tag);
    element.textContent = text; // never markup: texts come from a model
    parent.append(element);
    return element;
  }

  function tint(x, top) {
    if (!x || !top) return "";
    const strength = 0.6 * Math.min(1, Math.abs(x) / top);
    return `rgba(var(${x > 0 ? "--up" : "--down"}), ${strength.toFixed(3)})`;
  }

  function fill(place, tokens, top, unit) {
    place.replaceChildren();
    if (!tokens.length) made("span", "(nothing)", place).className = "note";
    for (const [text, x] of tokens) {
      const gap = text.length - text.replace(/^ +/, "").length; // a space before a word has no tint
      const inside = gap < text.length ? gap : 0;
      place.append(text.slice(0, inside));
      const span = made("span", text.slice(inside), place);
      span.style.background = tint(x, top);
      span.title = `${unit} ${signed(x)} nats`;
    }
  }

  function options(menu, names, at) {
    menu.replaceChildren();
    names.forEach((name, i) => { made("option", name, menu).value = i; });
    menu.value = at;
    menu.disabled = names.length < 2;
  }

  function clamped() { // a vector may have fewer layers than the last one
    const inside = (i, n) => Math.min(Math.max(Number.isInteger(i) ? i : 0, 0), n - 1);
    state[0] = inside(state[0], data.prompts.length);
    state[1] = inside(state[1], data.vectors.length);
    state[2] = inside(state[2], data.vectors[state[1]].layers.length);
    state[3] = inside(state[3], data.alphas.length);
  }

  function show() {
    clamped();
    const [p, v, l, a] = state;
    const vector = data.vectors[v], layer = vector.layers[l], view = layer.views[p][a], kl = layer.kl[a];
    const short = (text) => text.length > 60 ? text.slice(0, 59) + "\u2026" : text;
    options(by("prompt"), data.prompts.map((said) => short(said[said.length - 1][1])), p);
    options(by("vector"), data.vectors.map((one) => one.name), v);
    options(by("layer"), vector.layers.map((one) => one.name), l);
    by("alpha").value = a;
    by("step").textContent = alpha(data.alphas[a]);
    by("alpha").setAttribute("aria-valuetext", `alpha ${alpha(data.alphas[a])}`);
    by("said").replaceChildren();
    for (const [role, words] of data.prompts[p]) {
      const line = made("div", "", by("said"));
      made("b", role || "prompt", line);
      line.append(words);
    }
    by("about").textContent = `${vector.name}, layer ${layer.name}, alpha ${alpha(data.alphas[a])}; ${vector.about}`;
    fill(by("base"), view.base, data.strongest, "log p");
    fill(by("steered"), view.steered, data.strongest, "log p");
    const figures = [`KL along the steered text ${number(view.kl)}`, `repetition ${number(100 * view.repetition, 0)} %`];
    by("figures").textContent = (view.changed ? "" : "The step does not change the text. ") +
      `${figures.join(", ")}. Tint: log p with steering minus without, blue up, red down; the strongest is ${data.strongest} nats.`;
    const known = kl !== null, share = known ? Math.min(1, Math.sqrt(Math.max(kl, 0) / (data.meter * data.budget))) : 0;
    by("price").textContent = known ? `${number(kl)} nats per token of neutral text, budget ${data.budget}` : "not measurable";
    by("bar").style.width = `${100 * share}%`;
    by("bar").style.background = known && kl <= data.budget ? "var(--ok)" : "var(--over)";
    by("line").style.left = `${100 / Math.sqrt(data.meter)}%`;
    by("meter").setAttribute("aria-valuenow", known ? kl : 0);
    by("meter").setAttribute("aria-valuemax", data.meter * data.budget);
    by("attribution").hidden = !data.method;
    if (data.method) {
      const tokens = view.tokens || [], top = Math.max(0, ...tokens.map(([, x]) => Math.abs(x)));
      fill(by("tokens"), tokens, top, "score");
      by("scale").textContent = tokens.length
        ? `${data.method}: blue speaks for the steered text, red for the unsteered; the strongest is ${number(top, 2)} nats.`
        : "Both texts are the same, or one is empty: there is nothing to compare.";
    }
    grid();
    history.replaceState(null, "", `#${state.join(",")}`);
  }

  function grid() {
    const table = by("grid"), [, v, l, a] = state;
    table.replaceChildren();
    const head = made("tr", "", made("thead", "", table)), body = made("tbody", "", table);
    made("th", "layer", head);
    data.alphas.forEach((x) => made("th", alpha(x), head));
    data.vectors[v].layers.forEach((layer, row) => {
      const line = made("tr", "", body);
      made("th", layer.name, line);
      layer.kl.forEach((kl, column) => {
        const cell = made("td", "", line), button = made("button", number(kl), cell);
        button.type = "button";
        if (kl !== null && kl <= data.budget) button.classList.add("within");
        if (row === l && column === a) button.classList.add("here");
        button.addEventListener("click", () => { state[2] = row; state[3] = column; show(); });
      });
    });
  }

  function fromAddress() {
    const given = location.hash.slice(1).split(",").map(Number);
    if (given.length === 4) state = given;
    show();
  }

  menus.forEach((id, i) => by(id).addEventListener("change", (event) => { state[i] = Number(event.target.value); show(); }));
  by("alpha").max = data.alphas.length - 1;
  data.alphas.forEach((_, i) => { made("option", "", by("steps")).value = i; });
  by("alpha").addEventListener("input", (event) => { state[3] = Number(event.target.value); show(); });
  by("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", fromAddress);
  fromAddress();
})();
