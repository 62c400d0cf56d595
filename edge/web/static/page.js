"use strict";
// The operator's page. Everything it shows comes from /api/events; text goes in as text, never as HTML.

const SIGNS = { pass: "✓", fail: "✕", unknown: "?" };
const $ = (id) => document.getElementById(id);
const THUMB = 320;
const pictureOf = (key, heat, side = 960) => `parts/${key}/${heat ? "heat" : "plain"}.jpg?side=${side}`;
let current = null; // the last page received
let closer = null; // the part in the dialog

function text(id, value) {
  const node = $(id);
  if (node.textContent !== value) node.textContent = value;
}

function reasonsOf(part) {
  const words = part.reasons.map((reason) => reason.replaceAll("_", " ")).join(", ");
  return part.detail ? `${words}: ${part.detail}` : words;
}

const ratioOf = (part) => (part.ratio === null ? "no score" : `${part.ratio.toFixed(2)} × threshold`);
// The camera's name where there are several.
let severalCameras = false;
const nameOf = (part) => (severalCameras ? `${part.camera}: ${part.part_id}` : part.part_id);
const timeOf = (part) => new Date(part.captured).toLocaleTimeString();

function showLatest(part) {
  if (!part) return;
  $("light").className = part.verdict;
  text("sign", SIGNS[part.verdict]);
  text("word", part.verdict);
  text("ratio", ratioOf(part));
  text("why", reasonsOf(part) || "\u00a0");
  text("part", `${nameOf(part)} · ${timeOf(part)} · ${part.latency_ms.toFixed(0)} ms`);
  const picture = $("picture");
  const source = pictureOf(part.key, $("heat").checked);
  picture.hidden = !part.has_picture;
  if (part.has_picture && !picture.src.endsWith(source)) picture.src = source;
  picture.alt = `${nameOf(part)}: ${part.verdict}`;
  $("open-latest").disabled = false;
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

function card(part) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.className = part.verdict;
  button.dataset.key = part.key;
  button.setAttribute("aria-label", `${nameOf(part)}, ${part.verdict}, ${ratioOf(part)}: look closer`);
  const frame = document.createElement("div");
  frame.className = "frame";
  if (part.has_picture) {
    const image = document.createElement("img");
    image.src = pictureOf(part.key, true, THUMB);
    image.alt = "";
    image.addEventListener("error", () => image.remove()); // newer parts have pushed it out of memory
    image.decoding = "async";
    frame.append(image);
  }
  const score = document.createElement("span");
  score.textContent = `${SIGNS[part.verdict]} ${ratioOf(part)}`;
  const name = document.createElement("span");
  name.textContent = `${timeOf(part)} · ${nameOf(part)}`;
  button.append(frame, score, name);
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

function showHealth(health) {
  $("problem").hidden = !health.problem;
  text("problem", health.problem ? `Not ready: ${health.problem}.` : "");
  const facts = [];
  const dropped = Object.entries(health.dropped).filter(([, count]) => count);
  facts.push(["Frames dropped", dropped.length ? dropped.map(([why, count]) => `${count} ${why.replaceAll("_", " ")}`).join(", ") : "none"]);
  const counts = { triggers: "Parts announced", missing: "Parts missing", duplicates: "Parts repeated", late: "Parts late" };
  for (const [key, name] of Object.entries(counts)) {
    const count = health.cameras.reduce((sum, camera) => sum + camera.counts[key], 0);
    if (count) facts.push([name, String(count)]);
  }
  for (const one of health.deliveries) {
    const lost = one.lost ? `, ${one.lost} lost` : "";
    facts.push([`Delivery to ${one.name}`, one.error ? `${one.waiting} waiting${lost}: ${one.error}` : one.waiting ? `${one.waiting} waiting${lost}` : `all delivered${lost}`]);
  }
  const list = $("facts");
  const next = JSON.stringify(facts);
  if (list.dataset.shown === next) return;
  list.dataset.shown = next;
  list.replaceChildren(...facts.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const meaning = document.createElement("dd");
    term.textContent = name;
    meaning.textContent = value;
    return [term, meaning];
  }));
}

function show(page) {
  current = page;
  severalCameras = page.health.cameras.length > 1;
  showLatest(page.view.latest);
  showCounts(page.view.today);
  showChart(page.view.scores);
  showParts("rejects", page.view.rejects);
  showParts("recent", page.view.recent);
  $("no-rejects").hidden = page.view.rejects.length > 0;
  showHealth(page.health);
}

function look(part) {
  closer = part;
  text("closer-title", `${SIGNS[part.verdict]} ${part.verdict}, ${ratioOf(part)}`);
  text("closer-why", [reasonsOf(part), nameOf(part), new Date(part.captured).toLocaleString()].filter(Boolean).join(" · "));
  $("closer-plain").src = pictureOf(part.key, false);
  $("closer-heat").src = pictureOf(part.key, true);
  for (const button of document.querySelectorAll("#opinion [data-was]")) button.disabled = !part.has_picture;
  text("answer", part.has_picture ? "\u00a0" : "This part has no picture.");
  $("closer").showModal();
}

async function mark(was) {
  const token = $("token").value || sessionStorage.getItem("token") || "";
  text("answer", "…");
  try {
    const response = await fetch(`api/parts/${closer.key}/mark`, {
      method: "POST",
      headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
      body: JSON.stringify({ was }),
    });
    const body = await response.json();
    if (response.ok) {
      sessionStorage.setItem("token", token);
      $("token-row").hidden = true;
      text("answer", `Kept as ${was} for the next training.`);
    } else {
      if (response.status === 401) {
        sessionStorage.removeItem("token");
        $("token-row").hidden = false;
        $("token").focus();
      }
      text("answer", `Not kept: ${body.error}.`);
    }
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
$("heat").addEventListener("change", () => current && showLatest(current.view.latest));
$("open-latest").addEventListener("click", () => current && current.view.latest && look(current.view.latest));
$("token-row").hidden = Boolean(sessionStorage.getItem("token"));

fetch("api/line").then((response) => response.json()).then((line) => {
  const products = [...new Set(line.cameras.map((camera) => camera.product))].join(", ");
  const runs = line.cameras.map((camera) => `${camera.source} · model ${camera.model} · ${camera.provider}`);
  text("product", products);
  text("runs", runs.join(" | "));
  document.title = `${products} – EdgeFlame`;
});

const events = new EventSource("api/events");
events.onopen = () => { $("link").className = "up"; text("link", "live"); };
events.onerror = () => { $("link").className = "down"; text("link", "connection lost, trying again"); };
events.onmessage = (event) => show(JSON.parse(event.data));
