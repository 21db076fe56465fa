"use strict";
// Draws the page from the data block. Text that a model wrote becomes text nodes, and nothing else.

const { runs } = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["var(--student)", "var(--teacher)", "#2e9c6a", "#b0559b", "#b58a1b", "#5f6fd0"];
const byId = (id) => document.getElementById(id);

/** An element with properties, attributes (those with a hyphen, and role) and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "colour") element.style.setProperty(tag === "path" && attributes.class === "band" ? "fill" : "stroke", value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function figure(x) {
  if (x === null || x === undefined) return "–";
  if (typeof x !== "number") return String(x);
  const size = Math.abs(x);
  if (Number.isInteger(x) && size < 1e6) return x.toLocaleString("en");
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return x.toExponential(2);
  return String(Number(x.toPrecision(4)));
}

const percent = (x) => `${(100 * x).toFixed(1)}%`;
const points = (x) => `${x < 0 ? "−" : "+"}${Math.abs(100 * x).toFixed(1)}`;

// What each run is

for (const run of runs) {
  const told = [run.divergence, run.config.model, run.config.data === run.config.model ? "" : run.config.data];
  byId("runs").append(make("p", {}, runs.length > 1 ? `${run.name}: ` : "", told.filter(Boolean).join(" · ")));
}

// Scores

function row(cells, header = false) {
  return make("tr", {}, ...cells.map((c, i) => make(header || i === 0 ? "th" : "td", { scope: header ? "col" : "row" }, c)));
}

const scrolled = (table) => make("div", { className: "scrolled" }, table);

function scoreTables() {
  const place = byId("score-tables");
  const held = runs.filter((run) => run.summary.student_before);
  if (held.length) {
    const shown = (r) => (r ? `${percent(r.accuracy)} (${percent(r.interval_95[0])} to ${percent(r.interval_95[1])})` : "–");
    const taught = (run) => (run.summary.teacher_accuracy === undefined ? "–" : percent(run.summary.teacher_accuracy));
    place.append(scrolled(make("table", {}, make("caption", {}, "Held-out accuracy, with 95% intervals"),
      row(["run", "before", "after", "teacher, sees the solution"], true),
      ...held.map((run) => row([run.name, shown(run.summary.student_before), shown(run.summary.student_after), taught(run)])))));
  }
  for (const run of runs) {
    for (const [set, { models, difference }] of Object.entries(run.scores)) {
      const names = Object.keys(models);
      const caption = `${runs.length > 1 ? `${run.name}, ` : ""}${set}: ${models[names[0]].problems} problems, ${models[names[0]].samples} samples each`;
      const rows = Object.keys(models[names[0]].scores).map((score, i) => {
        const cells = names.map((n) => models[n].scores[score]).map((s) => `${percent(s.mean)} (${percent(s.low)} to ${percent(s.high)})`);
        if (difference) cells.push(i ? "" : `${points(difference.mean)} (${points(difference.low)} to ${points(difference.high)}), ${difference.p < 1e-4 ? "p < 0.0001" : `p = ${figure(difference.p)}`}`);
        return row([score, ...cells]);
      });
      for (const [key, shown] of [["tokens", figure], ["truncated", percent], ["no_answer", percent]])
        rows.push(row([key.replace("_", " "), ...names.map((n) => shown(models[n][key])), ...(difference ? [""] : [])]));
      place.append(scrolled(make("table", {}, make("caption", {}, caption), row(["", ...names, ...(difference ? ["adapter − base"] : [])], true), ...rows)));
    }
  }
  if (!place.childElementCount)
    place.append(make("p", { className: "hint" }, "None: nothing was held out, and python -m opsd_train.evaluate has not been called."));
}

// Curves

// Groups of panels; of each its title, its lines by the name of a metric, and how it is drawn.
const PANELS = {
  Learning: [
    ["Loss", { loss: "" }, { log: true }],
    ["KL, never clipped", { forward_kl: "forward", reverse_kl: "reverse" }, { log: true }],
    ["Held-out accuracy", { accuracy: "" }, { band: "interval_95", to: 1 }],
    ["Gradient norm", { grad_norm: "" }, {}],
    ["Learning rate", { learning_rate: "" }, {}],
    ["log q − log p of sampled tokens", { log_ratio: "" }, {}],
  ],
  "Clip and entropy": [
    ["Part of the loss that the clip took", { clipped_share: "" }, { unlessZero: true }],
    ["Entropy, in nats", { entropy_student: "student", entropy_teacher: "teacher" }, {}],
    ["Mass of the tokens that the servers sent", { mass_student: "student", mass_teacher: "teacher" }, { to: 1 }],
  ],
  Rollouts: [
    ["Tokens", { length_mean: "mean", length_max: "longest" }, {}],
    ["Part that was truncated", { truncated: "rollouts", held_out_truncated: "held-out" }, {}],
    ["Seconds of a step", { seconds: "" }, {}],
  ],
};

function numbers(run, name) {
  return run.metrics
    .filter((m) => m[name] !== undefined && m[name] !== null)
    .map((m) => [m.step, name === "seconds" ? Object.values(m.seconds).reduce((a, b) => a + b, 0) : m[name], m]);
}

/** Round numbers that hold all values between them, 0 among them; or powers of ten. */
function axis(values, to, log) {
  if (log) {
    const [low, high] = [Math.floor(Math.log10(Math.min(...values))), Math.ceil(Math.log10(Math.max(...values)))];
    const by = Math.ceil((high - low) / 5) || 1;
    return Array.from({ length: Math.ceil((high - low) / by) + 1 }, (_, i) => 10 ** (low + i * by));
  }
  const [low, high] = [Math.min(0, ...values), Math.max(to ?? 0, ...values)];
  const rough = (high - low) / 4 || 0.25;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const by = unit * [1, 2, 2.5, 5, 10].find((m) => m * unit >= rough * 0.999);
  const first = Math.floor(low / by + 1e-9);
  return Array.from({ length: Math.max(1, Math.ceil(high / by - 1e-9) - first) + 1 }, (_, i) => (first + i) * by);
}

/** Lines of points [x, y] in an SVG that is read with the pointer or the arrow keys. */
function chart(title, lines, { to, log, xName, W = 360 }) {
  const [H, left, right, top, bottom] = [170, 48, 8, 8, 22];
  const all = lines.flatMap((l) => l.points);
  const usable = log ? all.filter((p) => p[1] > 0) : all;
  const ticks = axis(usable.flatMap((p) => [p[1], ...(p[2] ?? [])]), to, log && usable.length);
  const [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const xs = all.map((p) => p[0]);
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const X = (x) => left + ((x - first) / (last - first || 1)) * (W - left - right);
  const scale = log ? Math.log10 : (y) => y;
  const Y = (y) => H - bottom - ((scale(y) - scale(low)) / (scale(high) - scale(low) || 1)) * (H - top - bottom);

  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: "0", "aria-label": `${title}, ${xName} ${first} to ${last}: ${figure(low)} to ${figure(high)}` });
  for (const y of ticks) {
    svg.append(draw("line", { class: "grid", x1: left, x2: W - right, y1: Y(y), y2: Y(y) }));
    const label = draw("text", { x: left - 5, y: Y(y) + 4, "text-anchor": "end" });
    label.textContent = figure(Number(y.toPrecision(6)));
    svg.append(label);
  }
  for (const [x, anchor] of [[first, "start"], [last, "end"]]) {
    const label = draw("text", { x: X(x), y: H - 6, "text-anchor": anchor });
    label.textContent = `${xName} ${x}`;
    svg.append(label);
  }
  for (const { points, colour, dashed } of lines) {
    const shown = log ? points.filter((p) => p[1] > 0) : points;
    const banded = shown.filter((p) => p[2]);
    if (banded.length > 1) {
      const edge = (k) => banded.map((p) => `${X(p[0])},${Y(p[2][k])}`);
      svg.append(draw("path", { class: "band", colour, d: `M${[...edge(0), ...edge(1).reverse()].join("L")}Z` }));
    }
    if (!shown.length) continue;
    const path = shown.map((p) => `${X(p[0])},${Y(p[1])}`).join("L");
    const line = draw("path", { class: "series", colour, d: `M${path}${shown.length === 1 ? "h.01" : ""}`, "stroke-linecap": "round" });
    if (dashed) line.setAttribute("stroke-dasharray", "5 3");
    if (shown.length === 1) line.setAttribute("stroke-width", "5");
    svg.append(line);
  }
  const cursor = draw("line", { class: "cursor", y1: top, y2: H - bottom, visibility: "hidden" });
  svg.append(cursor);

  const reading = make("div", { className: "reading", "aria-live": "polite" });
  const places = [...new Set(xs)].sort((a, b) => a - b);
  let at = places.length - 1;
  const show = (index) => {
    at = Math.max(0, Math.min(places.length - 1, index));
    const x = places[at];
    cursor.setAttribute("x1", X(x));
    cursor.setAttribute("x2", X(x));
    cursor.setAttribute("visibility", "visible");
    const values = lines.map((l) => [l.name, l.points.find((p) => p[0] === x)]).filter(([, p]) => p);
    reading.textContent = `${xName} ${x}: ${values.map(([n, p]) => `${n} ${figure(p[1])}`.trim()).join(", ")}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = first + (((event.clientX - box.left) / box.width) * W - left) / (W - left - right) * (last - first);
    show(places.reduce((best, p, i) => (Math.abs(p - x) < Math.abs(places[best] - x) ? i : best), 0));
  });
  svg.addEventListener("focus", () => show(at));
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: places.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
  const keys = lines.filter((l) => l.key).map((l) => key(l.key, l.colour, l.dashed));
  return make("figure", {}, make("figcaption", {}, title, make("span", { className: "keys" }, ...keys)), svg, reading);
}

function key(name, colour, dashed) {
  const line = draw("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2, colour });
  if (dashed) line.setAttribute("stroke-dasharray", "5 3");
  return make("span", { className: "key" }, draw("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, line), name);
}

function curves() {
  const several = runs.length > 1;
  const place = byId("panels");
  place.replaceChildren();
  for (const [heading, panels] of Object.entries(PANELS)) {
    const shown = [];
    for (const [title, names, options] of panels) {
      const lines = runs.flatMap((run, r) =>
        Object.entries(names).map(([name, called], i) => ({
          name: several ? `${run.name} ${called}` : called,
          key: several && r ? "" : called, // what is dashed is so of all runs
          colour: COLOURS[(several ? r : i) % COLOURS.length],
          dashed: several && i > 0,
          points: numbers(run, name).map(([x, y, m]) => [x, y, options.band && m[options.band]]),
        }))).filter((l) => l.points.length);
      const isEmpty = options.unlessZero && lines.every((l) => l.points.every((p) => p[1] === 0));
      if (lines.length && !isEmpty) shown.push(chart(title, lines, { ...options, log: options.log && byId("log").checked, xName: "step" }));
    }
    if (shown.length) place.append(make("h3", {}, heading), ...shown);
  }
  if (!place.childElementCount) place.append(make("p", { className: "hint" }, "No step has been taken yet."));
}

function legend() {
  if (runs.length > 1) byId("legend").append(...runs.map((run, r) => key(run.name, COLOURS[r % COLOURS.length])));
}

// Rollouts, token by token

const ALL_MEASURES = [
  ["loss", "Divergence"], ["forward_kl", "Forward KL"], ["reverse_kl", "Reverse KL"],
  ["entropy_student", "Student's entropy"], ["entropy_teacher", "Teacher's entropy"],
  ["clipped_share", "Part that the clip took"], ["log_ratio", "Log-ratio, teacher over student"],
  ["mass_student", "Student's mass on the tokens sent"], ["mass_teacher", "Teacher's mass on them"],
];
const samples = runs.flatMap((run) => run.rollouts.map((rollout) => ({ run, rollout })));
const isClipped = samples.some(({ rollout }) => rollout.clipped_share?.some((x) => x !== 0));
// A teacher on servers has fewer: what all rollouts have can be shown of each.
const MEASURES = ALL_MEASURES.filter(([name]) => (name !== "clipped_share" || isClipped)
  && samples.every(({ rollout }) => rollout[name === "log_ratio" ? "logp_teacher" : name]));
let current = null; // the rollout shown, its values by measure, the token pointed at

function valuesOf(rollout, measure) {
  if (measure !== "log_ratio") return rollout[measure];
  return rollout.logp_teacher.map((q, i) => (q === null || rollout.logp_student[i] === null ? null : q - rollout.logp_student[i]));
}

/** A token as it is read: what cannot be seen gets a mark. */
function visible(text) {
  if (text === "") return "∅";
  return text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
}

function showRollout(index) {
  const { run, rollout } = samples[index];
  byId("sample").selectedIndex = index;
  byId("previous").disabled = index === 0;
  byId("next").disabled = index === samples.length - 1;
  byId("prompt").textContent = rollout.prompt;
  byId("reference").textContent = rollout.reference;
  const cut = rollout.tokens.length < rollout.length ? `, the first ${rollout.tokens.length.toLocaleString("en")} shown` : "";
  byId("about").textContent = `Step ${rollout.step}; ${rollout.length.toLocaleString("en")} tokens${cut}; ` +
    `${rollout.finished ? "reached the end of text" : "stopped at the length limit"}. Divergence: ${run.divergence}.`;
  const spans = rollout.tokens.map((text, i) => make("span", { id: `token-${i}`, role: "option", "aria-selected": "false" }, visible(text)));
  byId("tokens").replaceChildren(...spans);
  byId("tokens").scrollTop = 0;
  current = { index, rollout, spans, at: null };
  colour();
  profile();
  pointAt(0, false);
}

function colour() {
  const measure = byId("colour").value;
  const values = valuesOf(current.rollout, measure);
  const sizes = values.filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  const full = sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
  values.forEach((value, i) => {
    // Infinite, or not a number: as strong as can be.
    const strength = value === null ? 1 : Math.sqrt(Math.min(1, Math.abs(value) / full));
    const tint = value !== null && value < 0 ? "--cold" : "--heat";
    current.spans[i].style.backgroundColor = `rgba(var(${tint}), ${(0.85 * strength).toFixed(3)})`;
  });
  const ramp = make("span", { className: "ramp" });
  const signed = values.some((v) => v < 0);
  ramp.style.background = `linear-gradient(90deg, ${signed ? "rgba(var(--cold), .85)" : "rgba(var(--heat), 0)"}, ${signed ? "rgba(var(--heat), 0)," : ""} rgba(var(--heat), .85))`;
  byId("scale").replaceChildren(signed ? figure(-full) : "0", ramp, `${figure(full)} and more`);
  current.values = values;
}

function profile() {
  const { rollout } = current;
  const line = (name, called, i) => ({ name: called, key: called, colour: COLOURS[i], points: (rollout[name] ?? []).map((y, x) => [x, y]).filter((p) => p[1] !== null) });
  const panels = [
    ["Entropy along the rollout, in nats", [line("entropy_student", "student", 0), line("entropy_teacher", "teacher", 1)]],
    ["Part of each token's divergence that the clip took", isClipped ? [line("clipped_share", "", 0)] : []],
  ].map(([title, lines]) => [title, lines.filter((l) => l.points.length)]).filter(([, lines]) => lines.length);
  // As wide as the page has room for: its words are then as large as elsewhere.
  const W = Math.max(280, Math.min(720, byId("profile").clientWidth - 20));
  byId("profile").replaceChildren(...panels.map(([title, lines]) => chart(title, lines, { xName: "token", W })));
}

function choices(title, flat, sampled) {
  const rows = [];
  for (let i = 0; i < flat.length; i += 2) {
    const p = flat[i + 1] === null ? 0 : Math.exp(flat[i + 1]);
    rows.push(make("tr", { className: flat[i] === sampled ? "sampled" : "" },
      make("td", {}, make("code", {}, visible(flat[i]).replace(/\n/g, ""))),
      make("td", { className: "number" }, percent(p)),
      make("td", {}, make("meter", { min: 0, max: 1, value: p, "aria-label": percent(p) }))));
  }
  return [make("h3", {}, title), make("table", {}, ...rows)];
}

function pointAt(index, focused = true) {
  const { rollout, spans, at } = current;
  const to = Math.max(0, Math.min(spans.length - 1, index));
  if (at !== null) spans[at].setAttribute("aria-selected", "false");
  current.at = to;
  spans[to].setAttribute("aria-selected", "true");
  byId("tokens").setAttribute("aria-activedescendant", spans[to].id);
  if (focused) spans[to].scrollIntoView({ block: "nearest" });
  const p = (log) => (log === null ? "0%" : percent(Math.exp(log)));
  const facts = [
    ...MEASURES.map(([measure, name]) => [name, figure(valuesOf(rollout, measure)[to])]),
    ["Sampled token, to the student", p(rollout.logp_student[to])],
    ...(rollout.logp_teacher ? [["Sampled token, to the teacher", p(rollout.logp_teacher[to])]] : []),
  ];
  byId("detail").replaceChildren(
    make("h3", {}, `Token ${to}: `, make("code", {}, visible(rollout.tokens[to]).replace(/\n/g, ""))),
    make("table", {}, ...facts.map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", { className: "number" }, value)))),
    ...choices("What the student would say", rollout.student[to], rollout.tokens[to]),
    ...choices("What the teacher would say", rollout.teacher[to], rollout.tokens[to]));
}

/** The token above or below the one pointed at. */
function beside(up) {
  const boxes = current.spans.map((s) => s.getBoundingClientRect());
  const here = boxes[current.at];
  const next = boxes.findIndex((b, i) => i > current.at && b.top > here.top + 2);
  const line = boxes.filter((b) => (up ? b.top < here.top - 2 : next >= 0 && Math.abs(b.top - boxes[next].top) < 2));
  const top = up ? Math.max(...line.map((b) => b.top)) : null;
  const near = line.filter((b) => !up || Math.abs(b.top - top) < 2).sort((a, b) => Math.abs(a.left - here.left) - Math.abs(b.left - here.left));
  return near.length ? boxes.indexOf(near[0]) : current.at;
}

function rolloutView() {
  if (!samples.length) {
    byId("rollout-view").replaceChildren(make("p", { className: "hint" }, "None was recorded: see the option record_rollouts."));
    return;
  }
  const counts = new Map();
  for (const { run, rollout } of samples) {
    const of = `${runs.length > 1 ? `${run.name}, ` : ""}step ${rollout.step}`;
    counts.set(of, (counts.get(of) ?? 0) + 1);
    byId("sample").append(make("option", {}, `${of}, rollout ${counts.get(of)}`));
  }
  byId("colour").append(...MEASURES.map(([value, name]) => make("option", { value }, name)));
  byId("sample").addEventListener("change", () => showRollout(byId("sample").selectedIndex));
  byId("colour").addEventListener("change", colour);
  byId("previous").addEventListener("click", () => showRollout(current.index - 1));
  byId("next").addEventListener("click", () => showRollout(current.index + 1));
  byId("largest").addEventListener("click", () => {
    const sizes = current.values.map((v) => (v === null ? Infinity : Math.abs(v)));
    pointAt(sizes.indexOf(Math.max(...sizes)));
  });
  const tokens = byId("tokens");
  tokens.addEventListener("pointerover", (event) => {
    const index = current.spans.indexOf(event.target);
    if (index >= 0) pointAt(index, false);
  });
  tokens.addEventListener("keydown", (event) => {
    const { at, spans } = current;
    const to = {
      ArrowLeft: () => at - 1, ArrowRight: () => at + 1, Home: () => 0, End: () => spans.length - 1,
      ArrowUp: () => beside(true), ArrowDown: () => beside(false),
    }[event.key];
    if (!to) return;
    event.preventDefault();
    pointAt(to());
  });
  showRollout(0);
}

// Config

function configTable() {
  const several = runs.length > 1;
  byId("different-label").textContent = several ? "only what differs between the runs" : "only what differs from the defaults";
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const text = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  const differs = (name) => (several ? new Set(runs.map((run) => text(run.config[name]))).size > 1 : runs[0].changed.includes(name));
  const only = byId("different").checked;
  const rows = names.filter((name) => differs(name) || !only).map((name) =>
    make("tr", {}, make("th", { scope: "row" }, name),
      ...runs.map((run) => make("td", { className: differs(name) ? "other" : "" }, text(run.config[name])))));
  byId("config-table").replaceChildren(row(["option", ...runs.map((run) => run.name)], true), ...rows);
}

scoreTables();
legend();
curves();
rolloutView();
configTable();
byId("log").addEventListener("change", curves);
byId("different").addEventListener("change", configTable);
