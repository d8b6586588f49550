// Draws the state that the server sends, and sends back what the person chooses.
// Every text is set as text: nothing that a model writes becomes markup.
"use strict";

const by = (id) => document.getElementById(id);
let state = {phase: "writing", answers: []};
let sent = false; // a choice is on its way

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---- the question ------------------------------------------------------------------------------

function draw(next) {
  const other = next.question !== state.question || next.answers.length !== by("answers").children.length;
  state = next;
  if (other || state.phase !== "asking") sent = false;
  document.body.className = state.phase;
  by("question").dataset.number = state.question;
  by("question").setAttribute("aria-busy", state.phase === "writing"); // not read aloud word by word
  by("where").textContent = where();
  const count = state.of || 1;
  by("steps").replaceChildren(...Array.from({length: count}, (_, i) => element("li", {class: step(i + 1)})));
  by("steps").classList.toggle("many", count > 40); // gaps would leave them no width
  const messages = state.messages || [];
  by("talk").replaceChildren(...messages.slice(0, -1).map((m) => element("p", {}, m.content)));
  by("prompt").textContent = ending() || (messages.length ? messages[messages.length - 1].content : "One moment …");
  if (other) by("answers").replaceChildren(...state.answers.map((_, i) => card(i)));
  state.answers.forEach((text, i) => { by("answers").children[i].querySelector("p").textContent = text; });
  by("most").textContent = state.answers.length;
  by("cut").textContent = state.phase === "asking" && state.cut ? `${state.cut} more did not come to an end` : "";
  for (const button of document.querySelectorAll("[data-choice]"))
    button.disabled = state.phase !== "asking" || (button.dataset.choice === "undo" && !state.undo);
  learned();
}

function where() {
  if (state.phase === "learning") return "Learning from your judgements …";
  if (!state.round) return "";
  const judged = `${state.judged} ${state.judged === 1 ? "judgement" : "judgements"}`;
  const at = state.phase === "asking" ? ` · ${state.at} of ${state.of}` : "";
  return `Round ${state.round} of ${state.rounds}${at} · ${judged}`;
}

function ending() {
  if (state.phase === "done") return "That was the last round. Thank you.";
  if (state.phase === "stopped") return "Stopped. All is saved: the same command with --resume goes on from here.";
  return "";
}

function step(number) {
  if (state.phase !== "asking") return "";
  return number < state.at ? "done" : number === state.at ? "now" : "";
}

function card(i) {
  const made = element("button", {type: "button", class: "answer"}, element("kbd", {}, String(i + 1)), element("p"));
  made.addEventListener("click", () => choose(i));
  return made;
}

// ---- the choice --------------------------------------------------------------------------------

async function choose(choice) {
  if (state.phase !== "asking" || sent) return;
  if (Number.isInteger(choice) && choice >= state.answers.length) return;
  if (choice === "undo" && !state.undo) return;
  sent = true;
  const cards = by("answers").children;
  if (Number.isInteger(choice)) {
    cards[choice].classList.add("picked");
    document.body.classList.add("chosen");
  }
  const body = JSON.stringify({question: state.question, choice, comment: by("comment").value});
  const headers = {"Content-Type": "application/json"};
  const reply = await fetch("judge", {method: "POST", headers, body}).catch(() => null);
  if (reply && reply.ok) {
    comment(false);
    if (choice !== "undo") by("comment").value = ""; // what is undone leaves it for the next one
    return;
  }
  sent = false;
  document.body.classList.remove("chosen");
  for (const each of cards) each.classList.remove("picked");
}

function comment(open) {
  by("comment").hidden = !open;
  by("comment-toggle").setAttribute("aria-expanded", open);
  if (open) by("comment").focus();
}

document.addEventListener("keydown", (event) => {
  // A button would be pressed again and again: one judgement for one stroke.
  if (event.repeat && event.key === "Enter" && event.target !== by("comment")) event.preventDefault();
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target === by("comment")) {
    if (event.key === "Escape") { comment(false); by("comment-toggle").focus(); }
    return;
  }
  const words = {t: "tie", s: "skip", u: "undo", backspace: "undo"};
  // Where a key types neither a Latin letter nor a digit (Cyrillic; digits on AZERTY), its place counts.
  const latin = /^[a-z0-9]$/i.test(event.key) || event.key.length > 1;
  const key = (latin ? event.key : event.code.replace(/^(Key|Digit)/, "")).toLowerCase();
  if (/^[1-4]$/.test(key)) choose(Number(key) - 1);
  else if (key === "c") { event.preventDefault(); comment(true); }
  else if (words[key]) choose(words[key]);
});
for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => choose(button.dataset.choice));
by("comment-toggle").addEventListener("click", () => comment(by("comment").hidden));

// ---- what was learned --------------------------------------------------------------------------

let drawn = ""; // what stands there, so that it is drawn (and lit up) only when it changes

function learned() {
  const shown = JSON.stringify([state.history, state.fixed]);
  if (shown === drawn || !state.history) return;
  drawn = shown;
  const history = state.history, last = history[history.length - 1];
  const win = last && last.win;
  const changed = state.fixed.filter((row) => row.now !== row.before);
  if (last) by("figures").replaceChildren(
    figure(win ? percent(win.rate) : "–", win
      ? `of the last ${win.n} blind comparisons won against the model as it was (95 %: ${percent(win.low)} – ${percent(win.high)})`
      : "of blind comparisons won against the model as it was: the first comes in round 2"),
    figure(last.kl.toFixed(3), "nats per token of drift from it (KL)"),
    figure(String(changed.length), `of ${state.fixed.length} fixed prompts answered otherwise than before`));
  const won = history.filter((row) => row.win);
  by("charts").replaceChildren(
    ...(won.length > 1 ? [chart("Win rate", "ties are halves", won, (row) => row.win.rate, 0, 1, percent, true)] : []),
    ...(history.length > 1 ? [chart("Drift", "KL, nats per token", history, (row) => row.kl, 0, Math.max(...history.map((row) => row.kl), 1e-3), (x) => x.toPrecision(2))] : []));
  const rows = [...changed, ...state.fixed.filter((row) => !changed.includes(row))];
  by("fixed").replaceChildren(...rows.map(fixed));
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function figure(number, what) {
  return element("div", {}, element("b", {}, number), element("span", {}, what));
}

function fixed(row) {
  const lines = row.now === row.before
    ? [element("dt", {}, "still"), element("dd", {class: "same"}, row.now)]
    : [element("dt", {}, "before"), element("dd", {class: "before"}, row.before),
       element("dt", {}, "now"), element("dd", {class: row.new ? "new" : ""}, row.now)];
  return element("article", {}, element("h3", {}, row.prompt), element("dl", {}, ...lines));
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A line over rounds, with the interval around it where there is one.
function chart(title, note, rows, value, low, high, label, even = false) {
  const left = 42, right = 392, top = 8, bottom = 124;
  const first = rows[0].round, span = Math.max(1, rows[rows.length - 1].round - first);
  const x = (row) => left + (right - left) * (row.round - first) / span;
  const y = (at) => bottom - (bottom - top) * (at - low) / (high - low);
  const path = (points) => "M" + points.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L");
  const parts = [];
  for (const at of [low, (low + high) / 2, high])
    parts.push(svg("path", {class: even && at === 0.5 ? "even" : "grid", d: `M${left} ${y(at)}H${right}`}),
      svg("text", {x: left - 7, y: y(at) + 4, "text-anchor": "end"}, label(at)));
  if (rows[0].win && even)
    parts.push(svg("path", {class: "band", d: path([...rows.map((row) => [x(row), y(row.win.high)]),
      ...rows.map((row) => [x(row), y(row.win.low)]).reverse()]) + "Z"}));
  const points = rows.map((row) => [x(row), y(value(row))]);
  const [endX, endY] = points[points.length - 1];
  parts.push(svg("path", {class: "line", d: path(points)}), svg("circle", {class: "dot", cx: endX, cy: endY, r: 4}));
  parts.push(svg("text", {x: left, y: bottom + 18}, `round ${first}`),
    svg("text", {x: right, y: bottom + 18, "text-anchor": "end"}, String(rows[rows.length - 1].round)));
  return element("figure", {class: "chart"},
    element("figcaption", {}, element("b", {}, title), " ", element("span", {}, note)),
    svg("svg", {viewBox: "0 0 400 146", role: "img", "aria-label": title}, ...parts));
}

// ---- the server --------------------------------------------------------------------------------

const events = new EventSource("events");
events.onmessage = (event) => {
  draw(JSON.parse(event.data));
  if (state.phase === "done" || state.phase === "stopped") events.close();
};
events.onerror = () => {
  by("where").textContent = "tinylm is not running: start it again with --resume, and open its new link.";
  document.body.className = "stopped";
};
