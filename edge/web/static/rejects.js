"use strict";
// Earlier rejects: found in what the line keeps, by day, camera, score and part.

let sought = null; // the last question, for "more"

function showCameras(lights) {
  $("sought-cameras").hidden = lights.length < 2;
  const select = $("sought-camera");
  if (select.options.length !== lights.length + 1) {
    select.replaceChildren(new Option("all", ""), ...lights.map((one) => new Option(one.camera)));
  }
}

function foundCard(one) {
  const item = make("li");
  const link = make("a", one.verdict);
  const picture = `api/rejects/${one.number}.jpg`;
  const frame = make("div", "frame");
  if (one.has_picture) {
    link.href = picture;
    link.target = "_blank";
    const image = make("img");
    image.loading = "lazy";
    image.src = `${picture}?side=${THUMB}`;
    image.alt = "";
    frame.append(image);
  } else frame.append(make("span", "soft", "picture not kept"));
  const when = new Date(one.captured);
  link.append(
    frame,
    make("span", "", `${SIGNS[one.verdict]} ${one.ratio === null ? "no score" : one.ratio.toFixed(2)}`),
    make("span", "", `${when.toLocaleDateString()} ${when.toLocaleTimeString()} · ${one.camera} · ${one.part_id}`),
    make("span", "said", reasonsOf(one)),
  );
  item.append(link);
  return item;
}

async function findRejects(before) {
  const query = new URLSearchParams(sought);
  if (before) query.set("before", before);
  text("past-told", "…");
  try {
    const response = await fetch(`api/rejects?${query}`);
    const answer = await response.json();
    if (!response.ok) { text("past-told", `Not found: ${answer.error}.`); return; }
    const cards = answer.parts.map(foundCard);
    if (before) $("found").append(...cards);
    else $("found").replaceChildren(...cards);
    const count = $("found").children.length;
    text("past-told", count ? `${count} found${answer.before ? ", and there may be more" : ""}; the newest first.` : "None found.");
    $("more").hidden = !answer.before;
    $("more").dataset.before = answer.before || "";
  } catch {
    text("past-told", "Not found: the daemon does not answer.");
  }
}

$("sought").addEventListener("submit", (event) => {
  event.preventDefault();
  const day = $("sought-day").value;
  const given = { camera: $("sought-camera").value, score: $("sought-score").value, part: $("sought-part").value.trim() };
  if (day) {
    // A day is that of the one who looks, wherever the line stands.
    given.since = new Date(`${day}T00:00`).toISOString();
    const end = new Date(`${day}T00:00`);
    end.setDate(end.getDate() + 1);
    given.until = end.toISOString();
  }
  sought = Object.fromEntries(Object.entries(given).filter(([, value]) => value));
  findRejects();
});
$("more").addEventListener("click", () => findRejects($("more").dataset.before));
