"use strict";
// Reads one tensor off the charts, and draws the table of all tensors when it is opened. The page works without it.
(() => {
  const models = JSON.parse(document.getElementById("data").textContent).map(unfold);

  function unfold(packed) {
    const names = [];
    let before = "";
    for (let k = 0; k < packed.names.length; k += 2) {
      before = before.slice(0, packed.names[k]) + packed.names[k + 1];
      names.push(before);
    }
    const text = (k) => packed.texts[k];
    return names.map((name, k) => ({
      name, shape: text(packed.shapes[k]), codec: text(packed.codecs[k]), reason: text(packed.reasons[k]),
      bits: packed.bits[k], sqnr: packed.sqnr[k], target: packed.targets[k], error: packed.errors[k], probe: packed.probes[k],
    }));
  }

  const fixed = (value) => (value === null ? "–" : value.toFixed(2));
  const exponent = (value) => (value ? value.toExponential(1) : "0");

  function reader(details, tensors) {
    const box = details.querySelector(".reader");
    if (!box) return;
    const coded = tensors.filter((tensor) => !tensor.reason);
    const input = box.querySelector("input"), output = box.querySelector("output");
    const cursors = details.querySelectorAll(".cursor");
    const show = (k, at = true) => {
      const tensor = coded[k], x = ((k + 0.5) * 1000) / coded.length;
      input.value = k;
      const said = `${tensor.name} · ${tensor.shape} · ${fixed(tensor.bits)} bits a weight · SQNR ${fixed(tensor.sqnr)} dB` +
        (tensor.target === null ? "" : `, target ${fixed(tensor.target)}`) + ` · max error ${exponent(tensor.error)}` +
        (tensor.probe === null ? "" : ` · HyperLinear ${fixed(tensor.probe)} dB`);
      output.textContent = said;
      input.setAttribute("aria-valuetext", said);
      for (const cursor of cursors) cursor.setAttribute("d", at ? `M${x} 0V100` : "");
    };
    input.addEventListener("input", () => show(Number(input.value)));
    for (const svg of details.querySelectorAll(".plot svg")) {
      svg.addEventListener("pointermove", (event) => {
        const place = svg.getBoundingClientRect();
        const k = Math.floor(((event.clientX - place.left) / place.width) * coded.length);
        show(Math.min(coded.length - 1, Math.max(0, k)));
      });
    }
    box.hidden = false;
    show(0, false);
  }

  const HEAD = ["Tensor", "Shape", "Codec", "Bits a weight", "SQNR dB", "Target dB", "Max error", "HyperLinear dB"];

  function element(kind, text, attributes) {
    const made = document.createElement(kind);
    if (text !== undefined) made.textContent = text;
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  }

  function every(details, tensors, model) {
    const box = element("div", undefined, { class: "scroll tall", tabindex: 0, role: "region", "aria-label": `Tensors of ${model}` });
    const table = element("table"), head = element("thead"), body = element("tbody"), line = element("tr");
    HEAD.forEach((title, k) => line.append(element("th", title, k > 2 ? { scope: "col", class: "number" } : { scope: "col" })));
    head.append(line);
    table.append(head, body);
    box.append(table);
    const rows = tensors.map((tensor) => {
      const row = element("tr"), name = element("th", undefined, { scope: "row" });
      name.append(element("code", tensor.name));
      row.append(name);
      const codec = tensor.reason ? `${tensor.codec}: ${tensor.reason}` : tensor.codec;
      const values = [tensor.shape, codec, fixed(tensor.bits), fixed(tensor.sqnr), fixed(tensor.target),
        tensor.reason ? "0" : exponent(tensor.error), fixed(tensor.probe)];
      for (const value of values) row.append(element("td", value));
      return row;
    });
    body.append(...rows);
    const label = element("label", "Name contains", { class: "find" }), input = element("input", undefined, { type: "search" });
    label.append(input);
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      rows.forEach((row, k) => { row.hidden = !tensors[k].name.toLowerCase().includes(wanted); });
    });
    details.querySelector("p").replaceWith(label, box);
  }

  document.querySelectorAll("details.model").forEach((details, k) => {
    const begin = () => {
      if (details.open && !details.dataset.read) {
        details.dataset.read = "yes";
        reader(details, models[k]);
      }
    };
    details.addEventListener("toggle", begin);
    begin();
  });
  document.querySelectorAll("details.every").forEach((details) => {
    details.addEventListener("toggle", () => {
      if (details.open && details.querySelector("p")) {
        const model = Number(details.dataset.model);
        every(details, models[model], details.closest(".model").querySelector("h3").textContent);
      }
    });
  });
  // A link to a model opens it.
  const follow = () => {
    const target = location.hash.startsWith("#model-") && document.getElementById(location.hash.slice(1));
    if (target) { target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", follow);
  follow();
})();
