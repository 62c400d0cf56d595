"use strict";
// Parts: the verdict light, counts, charts, cards, and the dialog. Text goes in as text, never as HTML.

const SIGNS = { pass: "✓", fail: "✕", unknown: "?" };
const PAUSED_SIGN = "❚❚";
const $ = (id) => document.getElementById(id);
const THUMB = 320;
const pictureOf = (key, heat, side = 960) => `parts/${key}/${heat ? "heat" : "plain"}.jpg?side=${side}`;
let current = null; // the last page received
let closer = null; // the part in the dialog

function text(id, value) {
  const node = $(id);
  if (node.textContent !== value) node.textContent = value;
}

function make(name, className, content) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (content !== undefined) node.textContent = content;
  return node;
}

function reasonsOf(part) {
  const words = part.reasons.map((reason) => reason.replaceAll("_", " ")).join(", ");
  return part.detail ? `${words}: ${part.detail}` : words;
}

const ratioOf = (part) => (part.ratio === null ? "no score" : `${part.ratio.toFixed(2)} × threshold`);
const timeOf = (part) => new Date(part.captured).toLocaleTimeString();

function showLatest(part) {
  // A line that rests looks at nothing: the last part's green light would say that the next one is good.
  const rests = current && statusOf(current).paused;
  $("light").className = part && !rests ? part.verdict : "none";
  text("sign", rests ? PAUSED_SIGN : part ? SIGNS[part.verdict] : "–");
  text("word", rests ? "paused" : part ? part.verdict : "no part yet");
  $("trial").hidden = rests || !part || !part.trial;
  text("ratio", part && !rests ? ratioOf(part) : "\u00a0");
  text("why", (part && !rests && reasonsOf(part)) || "\u00a0");
  text("part", part ? `${rests ? "before the pause: " : ""}${part.part_id} · ${timeOf(part)} · ${part.latency_ms.toFixed(0)} ms` : "\u00a0");
  const picture = $("picture");
  picture.hidden = !(part && part.has_picture);
  $("open-latest").disabled = !part;
  if (!part) return;
  if (part.has_picture) showPicture(part);
}

// One picture at a time: where parts come faster than pictures, each newer one would cut the last one off. Until it is
// there the part before is seen, so the words beneath say whose picture it is.
let loading = null;

function showPicture(part) {
  const picture = $("picture");
  const source = pictureOf(part.key, $("heat").checked);
  if (loading || picture.src.endsWith(source)) return;
  loading = part;
  picture.src = source;
}

function pictureSettled(event) {
  const part = loading;
  loading = null;
  if (!part) return;
  $("picture").alt = event.type === "load" ? `${part.part_id}: ${part.verdict}` : "";
  text("pictured", event.type === "load" ? `${SIGNS[part.verdict]} ${part.part_id}` : "\u00a0");
  if (current) showLatest(current.view.latest);
}

function showCounts(today) {
  const total = today.passed + today.failed + today.unknown;
  text("passed", String(today.passed));
  text("failed", String(today.failed));
  text("unknown", String(today.unknown));
  text("rate", total ? `${((100 * (today.failed + today.unknown)) / total).toFixed(1)} %` : "–");
}

function svg(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function showChart(scores) {
  const top = 2; // ratios above are drawn at the top: they are rejects, by how much does not matter here
  const height = 220;
  const width = 1000;
  const y = (ratio) => height - (Math.min(ratio, top) / top) * height;
  const step = width / Math.max(scores.length, 60);
  const bars = scores.map(([ratio, verdict], index) => {
    const at = ratio === null ? height * 0.25 : y(ratio);
    return svg("rect", { class: `bar-${verdict}`, x: index * step, y: at, width: Math.max(step * 0.8, 1), height: Math.max(height - at, 2) });
  });
  const line = (ratio, kind) => svg("line", { class: kind, x1: 0, x2: width, y1: y(ratio), y2: y(ratio) });
  $("chart").replaceChildren(line(0.5, "grid"), line(1.5, "grid"), ...bars, line(1, "limit"));
}

function showHours(hours) {
  const of = new Map(hours.map((one) => [one.hour, one]));
  const shares = hours.map((one) => one.rejected / one.parts);
  const most = Math.max(0.1, ...shares); // so that one reject of a thousand is no tower
  const columns = Array.from({ length: 24 }, (_, hour) => {
    const one = of.get(hour);
    const column = make("div", one ? "hour" : "hour none");
    const share = one ? one.rejected / one.parts : 0;
    column.title = one ? `${hour}:00: ${one.rejected} of ${one.parts} not passed` : `${hour}:00: no parts`;
    const bar = make("i", share ? "some" : "");
    bar.style.height = `${Math.round(100 * Math.min(1, share / most))}%`;
    column.append(make("b", "", one ? `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}` : ""), make("u"), make("span", "", String(hour)));
    column.children[1].append(bar);
    return column;
  });
  const box = $("hours");
  const next = JSON.stringify(hours);
  if (box.dataset.shown !== next) {
    box.dataset.shown = next;
    box.replaceChildren(...columns);
    const told = hours.map((one) => `${one.hour}:00 ${((100 * one.rejected) / one.parts).toFixed(1)} % of ${one.parts}`);
    box.setAttribute("aria-label", `Share of parts not passed, by hour: ${told.join(", ") || "no parts yet"}`);
  }
}

function card(part) {
  const item = make("li");
  const button = make("button", part.verdict);
  button.type = "button";
  button.dataset.key = part.key;
  button.setAttribute("aria-label", `${part.part_id}, ${part.verdict}, ${ratioOf(part)}: look closer`);
  const frame = make("div", "frame");
  if (part.has_picture) {
    const image = make("img");
    image.src = pictureOf(part.key, true, THUMB);
    image.alt = "";
    image.addEventListener("error", () => image.remove()); // newer parts have pushed it out of memory
    image.decoding = "async";
    frame.append(image);
  }
  button.append(frame, make("span", "", `${SIGNS[part.verdict]} ${part.ratio === null ? "no score" : part.ratio.toFixed(2)}`), make("span", "", `${timeOf(part)} · ${part.part_id}`));
  button.addEventListener("click", () => look(part));
  item.append(button);
  return item;
}

function showParts(id, parts) {
  // Cards that stay are kept: no flicker, and the keyboard's focus stays where it was.
  const list = $(id);
  const present = new Map([...list.children].map((item) => [Number(item.firstChild.dataset.key), item]));
  const wanted = parts.map((part) => present.get(part.key) || card(part));
  if (wanted.length !== list.children.length || wanted.some((item, index) => item !== list.children[index])) {
    const focused = document.activeElement;
    list.replaceChildren(...wanted);
    if (focused && list.contains(focused)) focused.focus({ preventScroll: true });
  }
}

function look(part) {
  closer = part;
  text("closer-title", `${SIGNS[part.verdict]} ${part.verdict}, ${ratioOf(part)}`);
  text("closer-why", [reasonsOf(part), part.camera, part.part_id, new Date(part.captured).toLocaleString()].filter(Boolean).join(" · "));
  $("closer-plain").src = pictureOf(part.key, false);
  $("closer-heat").src = pictureOf(part.key, true);
  for (const button of document.querySelectorAll("#opinion [data-was]")) button.disabled = !part.has_picture;
  text("answer", part.has_picture ? "\u00a0" : "This part has no picture.");
  $("closer").showModal();
  startMarking(part);
}

const token = () => $("token").value || $("order-token").value || sessionStorage.getItem("token") || "";

// Whatever changes something carries the token; once it was taken, it is asked for no more in this tab.
async function post(path, body) {
  const given = token();
  const response = await fetch(path, {
    method: "POST",
    // Not in Authorization: that is the proxy's where one asks for a name and a password.
    headers: { "X-EdgeFlame-Token": given, "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  // A proxy in between may answer with a page of its own.
  const answer = await response.json().catch(() => ({ error: `refused with status ${response.status}, not by the line` }));
  if (response.status === 401) sessionStorage.removeItem("token");
  else sessionStorage.setItem("token", given);
  showTokens();
  return { response, answer };
}

function showTokens() {
  const known = Boolean(sessionStorage.getItem("token"));
  $("token-row").hidden = known;
  document.querySelector("#tabs .token").hidden = known;
}

async function mark(was) {
  text("answer", "…");
  try {
    const { response, answer } = await post(`api/parts/${closer.key}/mark`, sayMore(was));
    if (response.status === 401) $("token").focus();
    text("answer", response.ok ? `Kept as ${was}${answer.kind ? `, ${answer.kind}` : ""}.` : `Not kept: ${answer.error}.`);
    if (response.ok) marked(answer);
  } catch {
    text("answer", "Not kept: the daemon does not answer.");
  }
}

for (const button of document.querySelectorAll("#opinion [data-was]")) {
  button.addEventListener("click", () => mark(button.dataset.was));
}
for (const id of ["closer-plain", "closer-heat"]) {
  $(id).addEventListener("error", () => text("answer", "Newer parts have pushed this part's picture out of memory."));
}
$("picture").addEventListener("error", () => { $("picture").hidden = true; });
$("opinion").addEventListener("submit", () => $("closer").close());
for (const end of ["load", "error"]) $("picture").addEventListener(end, pictureSettled);
$("heat").addEventListener("change", () => current && showLatest(current.view.latest));
$("open-latest").addEventListener("click", () => current && current.view.latest && look(current.view.latest));
showTokens();
