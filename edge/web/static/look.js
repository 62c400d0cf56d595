"use strict";
// What was learnt: look at it, try it, go live and back.

const SUSPECTS_SHOWN = 12;
const MARKED = "marks/"; // begins the names of marked pictures among the scores
let scores = null; // of the model learnt: { of: its digest, found }

async function showLook(one) {
  if (!one.learnt) { $("step-look").hidden = true; return; }
  text("promise", one.promise || "");
  const told = one.learnt.marks;
  $("compared").hidden = !told;
  if (told) text("compared", comparedWith(told));
  $("outdated").hidden = !one.is_outdated;
  $("threshold-own").disabled = one.learnt.chosen === null;
  const wanted = `${one.product}/${one.learnt.sha256}`;
  if (!scores || scores.of !== wanted) {
    scores = { of: wanted, found: null };
    try {
      const response = await fetch(`api/teaching/${encodeURIComponent(one.product)}/scores`);
      if (!response.ok) return;
      scores.found = await response.json();
    } catch { scores = null; return; }
  }
  if (!scores || !scores.found) return;
  const { choices, photographs } = scores.found;
  const slider = $("threshold");
  slider.max = String(choices.length - 1);
  const value = one.learnt.chosen ?? one.learnt.threshold;
  if (document.activeElement !== slider) slider.value = String(nearest(choices, value));
  showChoice();
  const out = new Set(one.photographs.filter((each) => each.thrown_out).map((each) => each.name));
  keepCards("suspects", photographs.slice(0, SUSPECTS_SHOWN), (each) => `${wanted}/${each.name}`, (each) => {
    const item = make("li");
    const button = make("button");
    button.type = "button";
    const ofMark = each.name.startsWith(MARKED);
    const picture = ofMark ? `api/marks/${encodeURIComponent(each.name.split("/").pop().replace(/\.png$/, ""))}.jpg` : `api/teaching/${encodeURIComponent(one.product)}/heat/${each.name}?side=480`;
    button.append(framed(picture), make("span"), make("span"));
    button.addEventListener("click", () => {
      if (ofMark) { showTab("marks"); return; }
      const isOut = button.classList.contains("out");
      teach(isOut ? "take-back" : "throw-out", { photographs: [each.name] }, isOut ? "Taken back in." : "Thrown out. Learn again to have it count.");
    });
    item.append(button);
    return item;
  }, (item, each) => {
    const button = item.firstChild;
    const isOut = out.has(each.name);
    const ratio = each.score / value;
    button.className = isOut ? "out" : ratio > 1 ? "fail" : "";
    button.children[1].textContent = `${ratio > 1 ? SIGNS.fail : SIGNS.pass} ${ratio.toFixed(2)}`;
    button.children[2].textContent = each.name.startsWith(MARKED) ? "marked good" : isOut ? "click to take it back in" : "click to throw it out";
    button.setAttribute("aria-label", `${each.name}, ${ratio.toFixed(2)} × threshold: ${button.children[2].textContent}`);
  });
}

function comparedWith(told) {
  const out = Object.entries(told.left_out).map(([why, count]) => `${count} left out: ${why}`);
  const odd = told.look_at.length ? `look again at ${told.look_at.map((name) => name.split("/").pop()).join(", ")} under Marks: the others contradict ${told.look_at.length > 1 ? "them" : "it"}` : "";
  return [`compared with the present model: ${told.comparison}`, ...out, odd].filter(Boolean).map(sentence).join(" ");
}

function nearest(choices, value) {
  const off = choices.map((each) => Math.abs(each.value - value));
  return off.indexOf(Math.min(...off));
}

function showChoice() {
  if (!scores || !scores.found) return;
  const { choices, threshold } = scores.found;
  const choice = choices[Number($("threshold").value)];
  if (!choice) return;
  const one = product();
  const taken = one && one.learnt && choice.value === (one.learnt.chosen ?? one.learnt.threshold);
  const expected = taken ? "" : ` Of new good parts about ${percent(choice.expected)} would be rejected, at most ${percent(choice.promised)} with ${Math.round(100 * threshold.confidence)} % confidence.`;
  text("threshold-told", `${choice.value.toPrecision(4)} rejects ${choice.rejected_parts} of the ${many(threshold.num_groups, "good part")} collected.${expected} A lower threshold finds fainter defects.`);
}

$("threshold").addEventListener("input", showChoice);
$("threshold").addEventListener("change", () => {
  const choice = scores && scores.found && scores.found.choices[Number($("threshold").value)];
  if (choice) teach("threshold", { threshold: choice.value }, "This threshold is taken.");
});
$("threshold-own").addEventListener("click", () => { $("threshold").blur(); teach("threshold", {}, "The threshold is as it was learnt."); });

function showLive(one) {
  const trial = one.trial;
  const ready = Boolean(one.learnt) && one.stage !== "learning";
  $("try-beside").hidden = $("try-alone").hidden = Boolean(trial);
  const bare = current && !(current.health.cameras.find((each) => each.camera === one.camera) || {}).model;
  const isLive = one.stage === "live";
  $("try-beside").disabled = !ready || bare || isLive;
  $("try-alone").disabled = $("go-live").disabled = !ready || isLive;
  $("end-trial").hidden = !trial;
  $("go-back").hidden = one.live.length === 0;
  text("go-live", one.live.length ? "Go live with what was learnt" : "Go live");
  const since = one.live.length ? `Live since ${new Date(one.live[0].since).toLocaleString()}.` : "";
  const told = trial && trial.problem ? sentence(`the trial does not work: ${trial.problem}`)
    : trial && trial.alone ? "On trial alone: each verdict is marked, and the PLC is told \u201cunknown\u201d. End the trial, or go live."
      : trial && trial.found && trial.found.parts ? `Beside the present model, without effect: ${compared(trial.found).slice(2)}.`
        : trial ? "Beside the present model, without effect: no part has passed yet." : since;
  text("trial-told", told);
}

function sure(id, usual, words, act) {
  let timer = 0;
  $(id).addEventListener("click", () => {
    if (!timer) {
      const before = $(id).textContent;
      $(id).textContent = words;
      timer = setTimeout(() => { timer = 0; $(id).textContent = before; }, 6000);
      return;
    }
    clearTimeout(timer);
    timer = 0;
    $(id).textContent = usual;
    act();
  });
}

$("try-beside").addEventListener("click", () => teach("try", {}, "It is tried beside the present model, without effect."));
$("try-alone").addEventListener("click", () => teach("try", { alone: true }, "It judges from the next part on, each verdict marked as a trial's."));
$("end-trial").addEventListener("click", () => teach("end-trial", {}, "The trial has ended; the camera inspects as before."));
sure("go-live", "Go live", "Sure? This model decides from the next part on", () => teach("live", {}, "It is live from the next part on, also after a restart.").then(refreshProducts));
sure("go-back", "Go back", "Sure? Goes back to what inspected before", () => teach("back", {}, "Gone back to what inspected before.").then(refreshProducts));
sure("discard", "Discard this product", "Sure? Deletes its photographs too", () => teach("discard", {}, "Discarded."));
