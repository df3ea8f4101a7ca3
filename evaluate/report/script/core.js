"use strict";
// What every script of the report shares, as `tcsae`: elements, figures, tokens, data on demand, the state in the URL.
// Data come as classic scripts, which call tcsae.index(...), .features(...), .sequences(...) and so on, since nothing
// else can be read where a page opens from disk. All text is set as text, never as HTML.
window.tcsae = (function () {
  const SVG = "http://www.w3.org/2000/svg";
  const by = (id) => document.getElementById(id);
  const data = { index: null, features: {}, sequences: {}, vocabulary: {}, map: null, pair: null, runs: [] };

  // Elements: make("p", {class: "note"}, "text", child, ...); "svg:path" is one of SVG.
  function make(name, attributes, ...children) {
    const element = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  }

  const ordinal = (n) => `${n}${n % 10 === 1 && n !== 11 ? "st" : n % 10 === 2 && n !== 12 ? "nd" : n % 10 === 3 && n !== 13 ? "rd" : "th"}`;
  const text = (token) => data.vocabulary[token] ?? `⟨${token}⟩`;
  const visible = (string) => string.replaceAll(" ", "␣"); // in lists a space is shown as a sign: it is part of the token
  const chip = (token, marked) => make("bdi", { class: marked ? "chip match" : "chip" }, visible(text(token)));

  // Scripts on demand, each once
  const loading = {};
  function load(path) {
    loading[path] ??= new Promise((resolve, reject) => {
      const script = make("script", { src: path });
      script.onload = resolve;
      script.onerror = () => { delete loading[path]; reject(new Error(`${path} is missing: the report's folder is not whole.`)); };
      document.head.append(script);
    });
    return loading[path];
  }

  // The state of a page is its hash: #latent=12&q=the&density.max=0.01. Of old links #12 is the latent.
  const state = {
    read() {
      const hash = location.hash.slice(1);
      return new URLSearchParams(/^\d+$/.test(hash) ? `latent=${hash}` : hash);
    },
    with(changes) {
      const parameters = state.read();
      for (const [key, value] of Object.entries(changes)) {
        if (value === null || value === undefined || value === "") parameters.delete(key); else parameters.set(key, value);
      }
      return `#${parameters}`;
    },
    replace(changes) { history.replaceState(null, "", state.with(changes)); },
    push(changes) { location.hash = state.with(changes); },
  };

  async function copy(string) {
    try {
      await navigator.clipboard.writeText(string);
    } catch { // a page from disk, or one without the permission
      const box = make("textarea", { "aria-hidden": "true", class: "copied" });
      box.value = string;
      document.body.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
    }
  }

  function save(name, content) {
    const link = make("a", { href: URL.createObjectURL(new Blob([content], { type: "application/json" })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const runOf = (latent, extra) => make("a", { href: state.with({ latent }), "data-latent": latent, ...extra }, String(latent));

  return {
    by, make, number, ordinal, text, visible, chip, load, state, copy, save, data, link: runOf,
    index: (index) => { data.index = index; },
    features: (chunk) => Object.assign(data.features, chunk),
    sequences: (rows) => Object.assign(data.sequences, rows),
    vocabulary: (texts) => { data.vocabulary = texts; },
    map: (map) => { data.map = map; },
    pair: (pair) => { data.pair = pair; },
    runs: (runs) => { data.runs = runs; },
  };
})();
