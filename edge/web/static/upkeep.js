"use strict";
// What watches over the line beside the verdicts, and what an operator may ask of a camera.

const GRADE = { ok: "ok", learning: "none", warning: "warn", alarm: "bad" };

function showStanding(status, problem) {
  const drift = status.drift;
  const grade = problem ? "bad" : drift ? GRADE[drift.condition] : "none";
  const words = problem ? `Not ready: ${problem}.` : status.ended ? "The source has ended." : "Ready.";
  const more = drift && ["warning", "alarm"].includes(drift.condition) ? ` ${sentence(drift.message)}` : "";
  $("standing").className = problem || more ? grade : "ok";
  text("standing", words + more);
}

const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}.`;

function showDrift(drift) {
  // Green says that all is as learnt; while a row below it says otherwise it does not.
  const unsure = drift && drift.condition === "ok" && drift.streams.some(isOff);
  $("drift-message").className = `standing ${drift && !unsure ? GRADE[drift.condition] : "none"}`;
  text("drift-message", drift ? sentence(drift.message) : "Nothing to be said yet.");
  for (const button of document.querySelectorAll("#condition [data-do]")) button.disabled = !drift;
  const rows = drift ? drift.streams : [];
  const body = $("streams").tBodies[0];
  const present = new Map([...body.rows].map((row) => [row.dataset.name, row]));
  const wanted = rows.map((one) => present.get(one.name) || streamRow(one.name));
  if (wanted.length !== body.rows.length || wanted.some((row, index) => row !== body.rows[index])) body.replaceChildren(...wanted);
  rows.forEach((one, index) => fillRow(wanted[index], one));
}

const isOff = (one) => one.rank !== null && (one.rank < one.usual[0] || one.rank > one.usual[1]);

function streamRow(name) {
  const row = make("tr");
  row.dataset.name = name;
  const title = make("th", "", name.replaceAll("_", " "));
  title.scope = "row";
  // Where the last parts lie among those learnt: a dot on a line whose green stretch is usual.
  const place = make("td", "place");
  place.append(make("i"));
  row.append(title, place, make("td", "said"));
  return row;
}

function fillRow(row, one) {
  row.className = GRADE[one.condition];
  row.style.setProperty("--from", `${100 * one.usual[0]}%`);
  row.style.setProperty("--to", `${100 * one.usual[1]}%`);
  const dot = row.querySelector("i");
  dot.hidden = one.rank === null;
  dot.style.left = `${100 * (one.rank ?? 0.5)}%`;
  const said = one.condition === "learning" ? `learning (${one.learnt ?? 0})`
    : one.direction ? `${one.condition}: ${one.direction}${one.since ? ` since ${new Date(one.since).toLocaleString()}` : ""}${isOff(one) ? "" : ", by now back"}`
      : isOff(one) ? `${one.rank > 0.5 ? "higher" : "lower"}, not yet sure` : "as learnt";
  const cell = row.querySelector(".said");
  if (cell.textContent !== said) cell.textContent = said;
}

function showGolden(golden) {
  const last = golden && golden.last;
  const failing = Boolean(last && !last.passed && !golden.acknowledged);
  $("golden-message").className = `standing ${!last ? "none" : last.passed ? "ok" : failing ? "bad" : "warn"}`;
  const how = last ? `${last.passed ? "Passed" : golden.acknowledged ? "Failed, acknowledged" : "Failed"} ${new Date(last.at).toLocaleString()} (${last.kind === "part" ? "before the camera" : "photographs"}): ${last.message}.` : "Not made yet.";
  text("golden-message", how);
  const wrong = last ? last.checks.filter((one) => one.verdict !== one.expected) : [];
  const list = $("golden-wrong");
  const lines = wrong.map((one) => `${one.part}: should ${one.expected}, came out ${one.verdict}${one.ratio === null ? "" : ` at ${one.ratio.toFixed(2)} × threshold`}`);
  if (list.dataset.shown !== lines.join("|")) {
    list.dataset.shown = lines.join("|");
    list.replaceChildren(...lines.map((line) => make("li", "", line)));
  }
  $("acknowledge").disabled = !failing;
}

const modelName = (one) => one.name || (one.origin === "file" ? "the configured file" : one.sha256.slice(0, 12));

function facts(list, pairs) {
  const next = JSON.stringify(pairs);
  if (list.dataset.shown === next) return;
  list.dataset.shown = next;
  list.replaceChildren(...pairs.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
}

function compared(found) {
  if (!found || !found.parts) return "";
  const tail = found.upper === null ? "" : ` (at most ${(100 * found.upper).toFixed(1)} %)`;
  return `, ${found.differing} of ${found.parts} verdicts differ${tail}: ${found.newly_failed} newly failed, ${found.newly_passed} newly passed`;
}

function showModels(models) {
  $("fleet-models").hidden = !models;
  if (!models) return;
  const { present, candidate, previous, outcomes } = models;
  const last = outcomes[0];
  const undone = last && ["rolled_back", "refused"].includes(last.fate);
  $("models-message").className = `standing ${candidate || present.on_trial ? "warn" : undone ? "bad" : "ok"}`;
  const words = present.on_trial ? `On trial: ${modelName(present)}. It is rolled back by itself if it proves bad.`
    : candidate ? `${modelName(candidate)}: ${candidate.stage}${candidate.total ? ` ${candidate.done} of ${candidate.total}` : ""}${compared(candidate.disagreement)}.`
      : undone ? `${modelName(last)} was ${last.fate.replaceAll("_", " ")}: ${last.detail || (last.reason || "").replaceAll("_", " ")}.` : `${modelName(present)} runs.`;
  text("models-message", words);
  facts($("models-facts"), [
    ["Runs", `${modelName(present)}${present.since ? ` since ${new Date(present.since).toLocaleString()}` : ""}`],
    ["Before it", previous.map(modelName).join(", ") || "none"],
    ...outcomes.slice(0, 3).map((one) => [new Date(one.at).toLocaleString(), `${modelName(one)}: ${one.fate.replaceAll("_", " ")}${one.detail ? `, ${one.detail}` : ""}${compared(one.disagreement)}`]),
  ]);
  $("rollback").disabled = previous.length === 0;
  $("allow-older").hidden = !(undone && last.reason === "older");
}

function showOperate(status) {
  text("operated", current.lights.length > 1 ? `Camera ${status.camera}` : "");
  $("pause").disabled = status.paused;
  $("resume").disabled = !status.paused;
  if (document.activeElement !== $("products") && $("products").value !== status.product) $("products").value = status.product;
}

function showHealth(health, status) {
  facts($("model-facts"), [
    ["Product", status.product],
    ["Model", `${status.model}, on ${status.provider}`],
    ["Threshold", `${status.threshold.toPrecision(5)}${status.threshold_set ? ", set by command" : ""}`],
  ]);
  const told = [];
  const dropped = Object.entries(status.dropped).filter(([, count]) => count);
  told.push(["Camera", status.problem || (status.ended ? "its source has ended" : status.waits ? "waits for files" : "works")]);
  told.push(["Source", status.source]);
  told.push(["Frames dropped", dropped.length ? dropped.map(([why, count]) => `${count} ${why.replaceAll("_", " ")}`).join(", ") : "none"]);
  const counted = { triggers: "Parts announced", missing: "Parts missing", duplicates: "Parts repeated", late: "Parts late" };
  for (const [key, name] of Object.entries(counted)) {
    if (status.counts[key]) told.push([name, String(status.counts[key])]);
  }
  for (const one of health.deliveries) {
    const lost = one.lost ? `, ${one.lost} lost` : "";
    told.push([`Delivery to ${one.name}`, one.error ? `${one.waiting} waiting${lost}: ${one.error}` : one.waiting ? `${one.waiting} waiting${lost}` : `all delivered${lost}`]);
  }
  facts($("facts"), told);
}

let forget = 0;

function say(words, kind) {
  $("done").className = kind;
  text("done", words);
  clearTimeout(forget);
  if (kind !== "busy") forget = setTimeout(() => { text("done", ""); $("done").className = ""; }, 15000);
}

async function order(body) {
  say(body.expected ? "Put the golden part before the camera…" : "…", "busy");
  try {
    const { response, answer } = await post(`api/cameras/${encodeURIComponent(current.camera)}/do`, body);
    if (response.status === 401) $("order-token").focus();
    say(response.ok ? answer.message : `Not done: ${answer.error}.`, response.ok && answer.ok ? "good" : "wrong");
  } catch {
    say("Not done: the daemon does not answer.", "wrong");
  }
}

for (const button of document.querySelectorAll("[data-do]")) {
  const usual = button.textContent;
  let sure = 0;
  button.addEventListener("click", () => {
    if (button.dataset.sure && !sure) {
      button.textContent = button.dataset.sure;
      sure = setTimeout(() => { sure = 0; button.textContent = usual; }, 6000);
      return;
    }
    clearTimeout(sure);
    sure = 0;
    button.textContent = usual;
    order({ action: button.dataset.do, ...(button.dataset.expected ? { expected: button.dataset.expected } : {}) });
  });
}
$("products").addEventListener("change", () => order({ action: "product", product: $("products").value }));
