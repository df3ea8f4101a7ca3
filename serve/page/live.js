"use strict";
// A text, the features of each of its tokens, and what follows where one is changed.
(function () {
  const { by, make, number, visible, chip, load, state, data, notes } = tcsae;
  const indexes = {}; // of the report, by run: what each latent fires on
  let runs = [], reading = null, nReads = 0, chosen = { token: 0, latent: null };

  async function ask(name, question) {
    const answer = await fetch(`answer/${name}`, { method: "POST", body: JSON.stringify(question || {}) });
    const found = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
    if (found.error) throw new Error(found.error);
    return found;
  }
  tcsae.ask = ask;

  const run = () => runs.find((one) => one.name === by("run").value);

  async function read(event) {
    event?.preventDefault();
    const began = performance.now(), number = ++nReads;
    by("said").textContent = "reading…";
    let answer = null, problem = "";
    try {
      answer = await ask("read", { run: run().name, text: by("text").value });
    } catch (error) { problem = error.message; }
    if (number !== nReads) return; // something else was asked for since
    if (problem) { by("said").textContent = problem; return; }
    reading = answer;
    by("said").textContent = `${reading.tokens.length} tokens in ${((performance.now() - began) / 1000).toFixed(2)} s`;
    await about(run().name);
    document.body.dataset.weights = run().weights;
    chosen.token = Math.min(run().skip_first, reading.tokens.length - 1);
    state.replace({ run: run().name });
    draw();
    by("tokens").dataset.ready = reading.tokens.length;
  }

  // The tokens that stand for each latent in the report.
  async function about(name) {
    if (indexes[name]) return;
    try {
      await load("report/sequences/vocabulary.js");
      await load(`report/runs/${encodeURIComponent(name)}/data/index.js`);
      indexes[name] = new Map(data.index.latents.map((latent, i) => [latent, data.index.fires[i]]));
    } catch { indexes[name] = new Map(); } // a report without this run: numbers alone
  }

  function draw() {
    const values = chosen.latent === null ? reading.latents.map((row) => row[0]?.[1] ?? 0)
      : reading.latents.map((row) => row.find(([latent]) => latent === chosen.latent)?.[1] ?? 0);
    const most = Math.max(1e-9, ...values.slice(run().skip_first));
    by("tokens").replaceChildren(...reading.tokens.map((token, i) => {
      const share = chosen.latent === null ? 0 : Math.min(1, values[i] / most);
      const button = make("button", { type: "button", class: `token ${share ? `on s${Math.min(4, 1 + Math.floor(share * 4))}` : ""}`,
        style: `--a:${(0.1 + 0.75 * share).toFixed(2)}`, tabindex: i === chosen.token ? "0" : "-1", "aria-pressed": String(i === chosen.token),
        title: chosen.latent === null ? `${reading.active[i]} features` : `latent ${chosen.latent}: ${number(values[i])}` }, token);
      button.addEventListener("click", () => pick(i));
      return button;
    }));
    by("h-of-token").textContent = `Features of token ${chosen.token}, “${visible(reading.tokens[chosen.token])}”${chosen.token < run().skip_first ? " (the SAE was not trained on this position)" : ""}`;
    by("of-token").replaceChildren(...reading.latents[chosen.token].slice(0, 16).map(([latent, value]) => item(latent, number(value))));
    const total = new Map();
    reading.latents.forEach((row, i) => { if (i >= run().skip_first) for (const [latent, value] of row) total.set(latent, Math.max(value, total.get(latent) ?? 0)); });
    const largest = [...total].sort((a, b) => b[1] - a[1]).slice(0, 16);
    by("of-text").replaceChildren(...largest.map(([latent, value]) => item(latent, `at most ${number(value)}`)));
    notes.show(document);
  }

  function item(latent, words) {
    const button = make("button", { type: "button", class: "latent", "data-latent": latent, "aria-pressed": String(latent === chosen.latent) }, `latent ${latent}`);
    button.addEventListener("click", () => choose(latent));
    const link = make("a", { class: "quiet", href: `report/runs/${encodeURIComponent(run().name)}/features.html#latent=${latent}`, "aria-label": `Feature page of latent ${latent}` }, "page");
    return make("li", {}, button, " ", make("small", {}, words), " ", ...(indexes[run().name].get(latent) || []).slice(0, 3).map((token) => chip(token)), link);
  }

  function choose(latent) {
    chosen.latent = chosen.latent === latent ? null : latent;
    if (chosen.latent !== null) by("latent").value = latent;
    state.replace({ latent: chosen.latent });
    draw();
  }

  function pick(i) {
    chosen.token = i;
    draw();
    by("tokens").children[i].focus();
  }

  async function change(event) {
    event.preventDefault();
    by("change-said").textContent = "computing…";
    const began = performance.now();
    const question = { run: run().name, text: by("text").value, latent: by("latent").valueAsNumber, kind: by("kind").value,
      value: by("value").valueAsNumber || 0, n_continued: by("n-continued").valueAsNumber || 0 };
    let found;
    try { found = await ask("change", question); } catch (error) { by("change-said").textContent = error.message; return; }
    by("change-said").textContent = `${((performance.now() - began) / 1000).toFixed(2)} s`;
    const mean = found.kl.reduce((sum, value) => sum + value, 0) / found.kl.length;
    const most = Math.max(1e-9, ...found.kl);
    const line = (title, tokens) => make("div", {}, make("h3", {}, title), make("p", { class: "tokens" }, ...tokens.map((token) => make("bdi", {}, token))));
    const side = (title, pairs) => make("div", { class: "pairs" }, make("h3", {}, title, " ", make("small", {}, "change of probability of the next token")),
      make("p", {}, ...pairs.flatMap(([token, moved]) => [make("bdi", { class: "chip" }, visible(token)), make("small", {}, ` ${moved > 0 ? "+" : ""}${number(moved)} `)])));
    by("outcome").replaceChildren(
      make("p", { class: "lead", id: "kl" }, `KL of the predictions: ${number(mean)} nats a token on average, ${number(most)} at most.`),
      make("p", { class: "tokens", "aria-label": "KL by token" }, ...(reading?.tokens.length === found.kl.length ? reading.tokens : found.kl.map(() => "·")).map((token, i) =>
        make("bdi", { class: found.kl[i] > 0.02 * most ? "on s2" : "", style: `--a:${(0.75 * found.kl[i] / most).toFixed(2)}`, title: `${number(found.kl[i])} nats` }, token))),
      make("div", { class: "side-by-side" }, line("Continuation as it is", found.clean), line("Continuation with the change", found.changed),
        side("Promoted", found.promoted), side("Suppressed", found.suppressed)));
    by("outcome").dataset.ready = question.kind;
  }

  document.addEventListener("DOMContentLoaded", async () => {
    ({ runs } = await ask("runs"));
    by("run").replaceChildren(...runs.map((one) => make("option", { value: one.name }, one.name)));
    const parameters = state.read();
    if (runs.some((one) => one.name === parameters.get("run"))) by("run").value = parameters.get("run");
    if (parameters.get("latent")) { chosen.latent = Number(parameters.get("latent")); by("latent").value = chosen.latent; }
    by("ask").addEventListener("submit", read);
    by("run").addEventListener("change", () => { chosen.latent = null; read(); });
    by("change-form").addEventListener("submit", change);
    by("tokens").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !reading) return;
      event.preventDefault();
      pick(Math.max(0, Math.min(reading.tokens.length - 1, chosen.token + step)));
    });
    read();
  });
})();
