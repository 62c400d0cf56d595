"use strict";
// Marks: what people say a part really was. The dialog's tools, and the tab that looks through the marks.

// Where the defect is: shapes in pixels of the part's picture, drawn over it as it is shown.
let shapes = [];
let stroke = null;
const plain = $("closer-plain"), drawing = $("drawing");
const MAX_POINTS = 300;

const tool = () => document.querySelector("#tools [aria-pressed=true]")?.dataset.tool || "";

function startMarking(part) {
  shapes = [];
  stroke = null;
  $("marked-kind").value = "";
  $("undo-mark").hidden = true;
  $("tools").hidden = !(part.has_picture && part.picture_size);
  for (const button of document.querySelectorAll("#tools [data-tool]")) button.setAttribute("aria-pressed", "false");
  drawing.classList.remove("on");
  draw();
}

// The picture lies in its frame with space beside it; a shape's pixels are the picture's own.
function shown() {
  const [width, height] = closer.picture_size;
  const scale = Math.min(plain.clientWidth / width, plain.clientHeight / height);
  return { scale, left: (plain.clientWidth - width * scale) / 2, top: (plain.clientHeight - height * scale) / 2, width, height };
}

function pointOf(event) {
  const box = drawing.getBoundingClientRect(), { scale, left, top, width, height } = shown();
  const at = (value, most) => Math.round(Math.min(Math.max(value, 0), most - 1));
  return [at((event.clientX - box.left - left) / scale, width), at((event.clientY - box.top - top) / scale, height)];
}

function shapeOf(line) {
  if (line.tool === "brush") return { shape: "brush", points: line.points, radius: line.radius };
  const [[x0, y0], [x1, y1]] = [line.points[0], line.points[line.points.length - 1]];
  return { shape: "polygon", points: [[x0, y0], [x1, y0], [x1, y1], [x0, y1]] };
}

function draw() {
  drawing.width = drawing.clientWidth;
  drawing.height = drawing.clientHeight;
  const all = stroke ? [...shapes, shapeOf(stroke)] : shapes;
  $("clear-shapes").disabled = all.length === 0;
  if (!all.length) return;
  const { scale, left, top } = shown(), pen = drawing.getContext("2d");
  pen.strokeStyle = pen.fillStyle = "rgb(230 60 60 / .75)";
  pen.lineCap = pen.lineJoin = "round";
  for (const one of all) {
    pen.beginPath();
    one.points.forEach(([x, y], index) => pen[index ? "lineTo" : "moveTo"](left + x * scale, top + y * scale));
    if (one.shape === "polygon") pen.closePath();
    else if (one.points.length === 1) pen.lineTo(left + one.points[0][0] * scale + 0.1, top + one.points[0][1] * scale);
    pen.lineWidth = one.shape === "brush" ? Math.max(2 * one.radius * scale, 2) : 3;
    pen.stroke();
  }
}

drawing.addEventListener("pointerdown", (event) => {
  if (!tool()) return;
  drawing.setPointerCapture(event.pointerId);
  const [width, height] = closer.picture_size;
  stroke = { tool: tool(), points: [pointOf(event)], radius: Math.max(1, Math.round(Math.max(width, height) / 80)) };
  draw();
});
drawing.addEventListener("pointermove", (event) => {
  if (!stroke || stroke.points.length >= MAX_POINTS) return;
  const last = stroke.points[stroke.points.length - 1], next = pointOf(event);
  if (Math.hypot(next[0] - last[0], next[1] - last[1]) >= stroke.radius / 2) { stroke.points.push(next); draw(); }
});
for (const end of ["pointerup", "pointercancel"]) {
  drawing.addEventListener(end, () => {
    if (stroke && (stroke.tool === "brush" || stroke.points.length > 1)) shapes.push(shapeOf(stroke));
    stroke = null;
    draw();
  });
}
for (const button of document.querySelectorAll("#tools [data-tool]")) {
  button.addEventListener("click", () => {
    const chosen = button.getAttribute("aria-pressed") !== "true";
    for (const other of document.querySelectorAll("#tools [data-tool]")) other.setAttribute("aria-pressed", String(chosen && other === button));
    drawing.classList.toggle("on", chosen);
  });
}
$("clear-shapes").addEventListener("click", () => { shapes = []; draw(); });
addEventListener("resize", () => { if (closer && closer.picture_size && $("closer").open) draw(); });

// What is said beside good or bad: only bad parts have a kind, and a place.
function sayMore(was) {
  const by = $("marked-by").value.trim();
  localStorage.setItem("marked-by", by);
  const said = { was, by };
  const kind = $("marked-kind").value.trim();
  if (was === "bad" && kind) said.kind = kind;
  if (was === "bad" && shapes.length) said.where = shapes;
  return said;
}

const nameOf = (mark) => mark.file.replace(/^.*\//, "").replace(/\.png$/, "");
const changeMark = (name, body) => post(`api/marks/${encodeURIComponent(name)}`, { ...body, by: $("marked-by").value.trim() });

let lastMark = null; // for "undo" in the dialog

function marked(mark) {
  lastMark = nameOf(mark);
  $("undo-mark").hidden = false;
}

$("undo-mark").addEventListener("click", async () => {
  const { response, answer } = await changeMark(lastMark, { action: "undo" });
  $("undo-mark").hidden = true;
  text("answer", !response.ok ? `Not taken back: ${answer.error}.` : answer ? `Taken back: it is ${answer.was} again.` : "Taken back: not marked.");
});

// The tab.

let markSkip = 0;

function knowKinds(kinds) {
  $("kinds").replaceChildren(...Object.keys(kinds).map((kind) => new Option(kind)));
  const select = $("marks-kind"), chosen = select.value;
  select.replaceChildren(new Option("all", ""), new Option("none said", "-"), ...Object.entries(kinds).map(([kind, count]) => new Option(`${kind} (${count})`, kind)));
  select.value = [...select.options].some((one) => one.value === chosen) ? chosen : "";
}

function markCard(mark) {
  const item = make("li"), box = make("div", mark.was === "bad" ? "marked fail" : "marked pass");
  const frame = make("div", "frame"), image = make("img");
  image.loading = "lazy";
  image.src = `api/marks/${encodeURIComponent(mark.name)}.jpg?side=${THUMB}`;
  image.alt = "";
  frame.append(image);
  const said = mark.verdict ? `line: ${mark.verdict}${mark.ratio === null ? "" : ` ${mark.ratio.toFixed(2)}`}` : "line: not known";
  const title = make("span", "", `${mark.was === "bad" ? "✕ was bad" : "✓ was good"}${mark.kind ? ` · ${mark.kind}` : ""}${mark.has_place ? " · place marked" : ""}`);
  const about = make("span", "said", [new Date(mark.marked).toLocaleString(), said, mark.part_id, mark.product, mark.by && `by ${mark.by}`].filter(Boolean).join(" · "));
  const bar = make("div", "bar"), told = make("span", "said");
  const button = (label, body, sure) => {
    const one = make("button", "", label);
    one.type = "button";
    one.addEventListener("click", async () => {
      if (sure && one.textContent !== sure) { one.textContent = sure; setTimeout(() => { one.textContent = label; }, 4000); return; }
      const { response, answer } = await changeMark(mark.name, typeof body === "function" ? body() : body);
      if (response.ok) showMarks();
      else told.textContent = `Not done: ${answer.error}.`;
    });
    bar.append(one);
  };
  if (mark.was === "bad") {
    const kind = make("input");
    kind.type = "text";
    kind.value = mark.kind || "";
    kind.setAttribute("list", "kinds");
    kind.setAttribute("aria-label", "Kind of defect");
    kind.placeholder = "kind";
    bar.append(kind);
    button("Set kind", () => ({ action: "correct", kind: kind.value.trim() || null }));
  }
  button(mark.was === "bad" ? "It was good" : "It was bad", { action: "correct", was: mark.was === "bad" ? "good" : "bad" });
  button("Undo", { action: "undo" });
  button("Delete", { action: "delete" }, "Sure? Delete");
  box.append(frame, title, about, bar, told);
  item.append(box);
  return item;
}

async function showMarks(skip = 0) {
  const given = { was: $("marks-was").value, kind: $("marks-kind").value, part: $("marks-part").value.trim() };
  const query = new URLSearchParams(Object.fromEntries(Object.entries(given).filter(([, value]) => value)));
  if (skip) query.set("skip", skip);
  try {
    const response = await fetch(`api/marks?${query}`), answer = await response.json();
    if (!response.ok) { text("marks-told", `Not found: ${answer.error}.`); return; }
    facts($("marks-facts"), [
      ["Marked good", String(answer.good)],
      ["Marked bad", String(answer.bad)],
      ["Kept at most", String(answer.at_most)],
      ["Where", answer.folder],
    ]);
    knowKinds(answer.kinds);
    const cards = answer.marks.map(markCard);
    if (skip) $("marks-found").append(...cards);
    else $("marks-found").replaceChildren(...cards);
    markSkip = skip + cards.length;
    text("marks-told", answer.fitting ? `${answer.fitting} found; the newest first.` : "None found. Mark parts under Inspect: click a part, then say what it was.");
    $("more-marks").hidden = markSkip >= answer.fitting;
  } catch {
    text("marks-told", "The daemon does not answer.");
  }
}

$("marks-sought").addEventListener("submit", (event) => { event.preventDefault(); showMarks(); });
$("more-marks").addEventListener("click", () => showMarks(markSkip));
$("marked-by").value = localStorage.getItem("marked-by") || "";
