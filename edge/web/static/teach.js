"use strict";
// Teaching a product: begin, where to look, collect, learn. What follows is in look.js.

let taught = { products: [], frames: {}, damaged: {} };
let chosenProduct = sessionStorage.getItem("taught") || "";
let seenTeaching = -1;
const chosenPhotographs = new Set();

const isShown = (id) => !$(id).hidden;
const product = () => taught.products.find((one) => one.product === chosenProduct) || taught.products[0] || null;
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const countMarks = (good, bad) => `${many(good + bad, "mark")} (${good} good, ${bad} bad)`;
const many = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

function heardOfTeaching(version) {
  if (version === seenTeaching || !isShown("teach")) return;
  seenTeaching = version;
  refreshTeaching();
}

let asking = false, askAgain = false;

async function refreshTeaching() {
  if (asking) { askAgain = true; return; }
  asking = true;
  try {
    taught = await (await fetch("api/teaching")).json();
    showTeaching();
  } catch {
    // The page says already that the daemon does not answer.
  } finally {
    asking = false;
    if (askAgain) { askAgain = false; refreshTeaching(); }
  }
}

async function teach(action, more = {}, done = "") {
  const name = more.product || (product() && product().product);
  say("…", "busy");
  try {
    const { response, answer } = await post("api/teaching", { action, product: name, ...more });
    if (response.status === 401) $("order-token").focus();
    say(response.ok ? done || "Done." : `Not done: ${answer.error}.`, response.ok ? "good" : "wrong");
    await refreshTeaching();
    return response.ok;
  } catch {
    say("Not done: the daemon does not answer.", "wrong");
    return false;
  }
}

function showTeaching() {
  const one = product();
  const select = $("taught");
  const names = taught.products.map((each) => each.product);
  if (JSON.stringify(names) !== select.dataset.shown) {
    select.dataset.shown = JSON.stringify(names);
    select.replaceChildren(...names.map((name) => new Option(name)));
  }
  $("taught-row").hidden = names.length === 0;
  if (one) select.value = one.product;
  for (const id of ["step-region", "step-collect", "step-learn", "step-discard"]) $(id).hidden = !one;
  $("step-look").hidden = $("step-live").hidden = !(one && (one.learnt || one.live.length));
  if (!isShown("begin-form")) $("begin-form").hidden = names.length > 0;
  $("begin").hidden = names.length === 0;
  const cameras = current ? current.lights.map((light) => light.camera) : [];
  $("begin-cameras").hidden = cameras.length < 2;
  if ($("begin-camera").options.length !== cameras.length) $("begin-camera").replaceChildren(...cameras.map((name) => new Option(name)));
  $("teach-told").hidden = Boolean(one);
  $("steps").hidden = !one;
  const problems = Object.entries(taught.damaged).map(([name, why]) => `${name}: ${why}`);
  if (one && one.problem) problems.unshift(one.problem);
  $("teach-problem").hidden = problems.length === 0;
  text("teach-problem", problems.map(sentence).join(" "));
  const notes = one ? one.notes : [];
  if ($("teach-notes").dataset.shown !== notes.join("|")) {
    $("teach-notes").dataset.shown = notes.join("|");
    $("teach-notes").replaceChildren(...notes.map((note) => make("li", "", sentence(note))));
  }
  if (!one) return;
  showRegion(one);
  showCollected(one);
  showLearning(one);
  showLook(one);
  showLive(one);
  showSteps(one);
}

// Which step is next; a step that cannot be taken yet has no section to go to.

const STEPS = [...document.querySelectorAll("[data-step]")];
const USUAL_PARTS = 30;
let wasLearning = null; // the product that was learning when last seen

const toStep = (name) => $(`step-${name}`).scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });

function showSteps(one) {
  const next = one.stage === "learning" ? "learn"
    : one.learnt && !one.is_outdated ? (one.trial || one.live.length ? "live" : "look")
      : one.num_parts >= USUAL_PARTS || one.learnt ? "learn" : one.region || one.num_parts ? "collect" : "region";
  for (const button of STEPS) {
    button.disabled = $(`step-${button.dataset.step}`).hidden;
    if (button.dataset.step === next) button.setAttribute("aria-current", "step"); else button.removeAttribute("aria-current");
  }
  // Who waited for it sees what was learnt without looking for it.
  if (wasLearning === one.product && one.stage !== "learning" && one.learnt && !one.problem) toStep("look");
  wasLearning = one.stage === "learning" ? one.product : null;
}

for (const button of STEPS) button.addEventListener("click", () => toStep(button.dataset.step));

// 1: where to look.

let drag = null;

function frameOf(one) {
  return taught.frames[one.camera] || one.frame;
}

function place_region(rectangle, frame) {
  const box = $("region");
  box.hidden = !rectangle || !frame;
  if (box.hidden) return;
  const [x, y, width, height] = rectangle;
  box.style.left = `${(100 * x) / frame[0]}%`;
  box.style.top = `${(100 * y) / frame[1]}%`;
  box.style.width = `${(100 * width) / frame[0]}%`;
  box.style.height = `${(100 * height) / frame[1]}%`;
}

function showRegion(one) {
  const frame = frameOf(one);
  if (!drag) place_region(one.region, frame);
  text("region-told", !frame ? "no picture has come yet" : one.region ? `${one.region[2]} × ${one.region[3]} of ${frame[0]} × ${frame[1]} pixels` : `the whole picture, ${frame[0]} × ${frame[1]} pixels`);
  $("region-whole").disabled = !one.region;
  if (!$("region-form").contains(document.activeElement)) {
    const shown = one.region || (frame ? [0, 0, ...frame] : ["", "", "", ""]);
    ["x", "y", "width", "height"].forEach((name, index) => { $(`region-${name}`).value = shown[index]; });
  }
}

function pointAt(event, frame) {
  const box = $("live-frame").getBoundingClientRect();
  const along = (value, first, length, most) => Math.round(Math.min(1, Math.max(0, (value - first) / length)) * most);
  return [along(event.clientX, box.left, box.width, frame[0]), along(event.clientY, box.top, box.height, frame[1])];
}

function dragged(event) {
  const [x, y] = pointAt(event, drag.frame);
  const [left, top] = [Math.min(x, drag.x), Math.min(y, drag.y)];
  return [left, top, Math.abs(x - drag.x), Math.abs(y - drag.y)];
}

$("framing").addEventListener("pointerdown", (event) => {
  const one = product();
  const frame = one && frameOf(one);
  if (!frame) return;
  event.preventDefault();
  const [x, y] = pointAt(event, frame);
  drag = { x, y, frame };
  $("framing").setPointerCapture(event.pointerId);
});
$("framing").addEventListener("pointermove", (event) => { if (drag) place_region(dragged(event), drag.frame); });
$("framing").addEventListener("pointerup", (event) => {
  if (!drag) return;
  const region = dragged(event);
  drag = null;
  // A click draws nothing.
  if (Math.max(region[2], region[3]) > 4) teach("region", { region }, "The model will look at this region.");
  else showTeaching();
});
$("framing").addEventListener("pointercancel", () => { drag = null; showTeaching(); });
$("region-whole").addEventListener("click", () => teach("region", {}, "The model will look at the whole picture."));
$("region-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const region = ["x", "y", "width", "height"].map((name) => Number($(`region-${name}`).value));
  teach("region", { region }, "The model will look at this region.");
});

// The picture of the camera is fetched anew while it can be seen.
let fetching = false;

function refreshFrame() {
  const one = product();
  if (!one || !isShown("teach") || document.hidden || fetching || drag || !taught.frames[one.camera]) return;
  fetching = true;
  $("live-frame").src = `api/teaching/frame.jpg?camera=${encodeURIComponent(one.camera)}&side=1280&at=${Date.now()}`;
}
for (const end of ["load", "error"]) $("live-frame").addEventListener(end, () => { fetching = false; });
setInterval(refreshFrame, 1000);

// 2: collect.

const REFUSED_WORDS = { too_dark: "too dark", too_bright: "too bright", blank: "nothing to be seen", out_of_focus: "out of focus", wrong_size: "another size than the others", frozen: "the very same picture again" };

function showCollected(one) {
  text("num-parts", String(one.num_parts));
  const out = one.photographs.filter((each) => each.thrown_out).length;
  const several = one.photographs.length - out > one.num_parts ? ` in ${many(one.photographs.length - out, "photograph")}` : "";
  text("num-told", `good ${one.num_parts === 1 ? "part" : "parts"}${several}${out ? `, ${out} thrown out` : ""}`);
  const last = one.promises[one.promises.length - 1].parts;
  $("goal-bar").style.width = `${Math.min(100, (100 * one.num_parts) / last)}%`;
  const steps = JSON.stringify([one.promises, one.num_parts]);
  if ($("goal-steps").dataset.shown !== steps) {
    $("goal-steps").dataset.shown = steps;
    $("goal-steps").replaceChildren(...one.promises.map((step) => {
      const item = make("li", one.num_parts >= step.parts ? "reached" : "");
      item.append(make("b", "", `${one.num_parts >= step.parts ? "✓ " : ""}${step.parts} parts`), `could promise at most ${percent(step.promised)} of good parts rejected`);
      return item;
    }));
  }
  const busy = one.stage === "learning";
  $("collect").hidden = one.collecting;
  $("collect-stop").hidden = !one.collecting;
  for (const id of ["collect", "take", "take-same"]) $(id).disabled = busy;
  $("take-same").disabled = busy || one.photographs.length === 0;
  text("collect-told", one.collecting
    ? `Each next good part is taken. Keep defective ones away, or throw them out afterwards.${one.num_passed_over ? ` ${many(one.num_passed_over, "part")} passed while one was written.` : ""}`
    : one.photographs.length ? "Click photographs to throw them out, or to say which show one part." : "Begin when good parts pass the camera.");
  showPhotographs(one);
  $("left-out").hidden = one.refused.length === 0;
  text("left-out-told", `${many(one.num_refused, "picture")} left out; the last ones`);
  keepCards("refused", one.refused, (each) => `${one.product}/${each.name}`, (each) => {
    const item = make("li");
    const card = make("div");
    card.append(framed(`api/teaching/${one.product}/refused/${each.name}?side=320`), make("span", "said", each.reasons.map((why) => REFUSED_WORDS[why] || why.replaceAll("_", " ")).join(", ")));
    item.append(card);
    return item;
  });
}

function framed(source) {
  const frame = make("div", "frame");
  const image = make("img");
  image.loading = "lazy";
  image.decoding = "async";
  image.alt = "";
  image.src = source;
  frame.append(image);
  return frame;
}

// Cards that stay are kept: no flicker, and the keyboard's focus stays where it was.
function keepCards(id, wanted, keyOf, makeCard, update = () => {}) {
  const list = $(id);
  const present = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const items = wanted.map((each) => {
    const key = keyOf(each);
    const item = present.get(key) || makeCard(each);
    item.dataset.key = key;
    update(item, each);
    return item;
  });
  if (items.length !== list.children.length || items.some((item, index) => item !== list.children[index])) list.replaceChildren(...items);
}

function showPhotographs(one) {
  for (const name of [...chosenPhotographs]) if (!one.photographs.some((each) => each.name === name)) chosenPhotographs.delete(name);
  $("chosen-bar").hidden = chosenPhotographs.size === 0 || one.stage === "learning";
  text("chosen-told", `${many(chosenPhotographs.size, "photograph")} chosen:`);
  const sizes = new Map();
  for (const each of one.photographs) sizes.set(each.part, (sizes.get(each.part) || 0) + 1);
  keepCards("photographs", [...one.photographs].reverse(), (each) => `${one.product}/${each.name}`, (each) => {
    const item = make("li");
    const button = make("button");
    button.type = "button";
    button.append(framed(`api/teaching/${one.product}/photographs/${each.name}?side=320`), make("span"));
    button.addEventListener("click", () => {
      if (!chosenPhotographs.delete(each.name)) chosenPhotographs.add(each.name);
      showPhotographs(product());
    });
    item.append(button);
    return item;
  }, (item, each) => {
    const button = item.firstChild;
    button.className = each.thrown_out ? "out" : "";
    button.setAttribute("aria-pressed", String(chosenPhotographs.has(each.name)));
    const said = `part ${each.part}${sizes.get(each.part) > 1 ? ` · ${sizes.get(each.part)} pictures` : ""}`;
    if (button.lastChild.textContent !== said) button.lastChild.textContent = said;
  });
}

for (const button of document.querySelectorAll("[data-teach]")) {
  button.addEventListener("click", async () => {
    const names = [...chosenPhotographs];
    chosenPhotographs.clear();
    await teach(button.dataset.teach, { photographs: names });
  });
}
$("collect").addEventListener("click", () => teach("collect", {}, "Each next part is taken."));
$("collect-stop").addEventListener("click", () => teach("stop", {}, "No more parts are taken."));
$("take").addEventListener("click", () => teach("take", {}, "Taken."));
$("take-same").addEventListener("click", () => teach("take", { same_part: true }, "Taken, of the same part."));

// 3: learn.

const LEAST_PARTS = 10, LEAST_WITH_PRIOR = 5;
const prior = () => $("prior").value || null;
const leastParts = () => (prior() ? LEAST_WITH_PRIOR : LEAST_PARTS);

function showLearning(one) {
  const going = one.learning;
  $("learning").hidden = $("learn-cancel").hidden = !going;
  $("learn").hidden = Boolean(going);
  const priors = $("prior");
  if (priors.dataset.shown !== one.priors.join("/")) {
    priors.dataset.shown = one.priors.join("/");
    priors.replaceChildren(new Option("these parts alone", ""), ...one.priors.map((name) => new Option(`these parts, and what ${name} knows`, name)));
    priors.value = one.learnt && one.priors.includes(one.learnt.prior) ? one.learnt.prior : "";
  }
  $("prior-row").hidden = Boolean(going) || one.priors.length === 0;
  const least = leastParts();
  $("learn").disabled = one.num_parts < least;
  text("learn", one.learnt ? "Learn again" : "Learn");
  const { good, bad } = one.marked;
  $("learn-marks").hidden = Boolean(going) || !one.learnt || good + bad === 0;
  $("learn-marks").disabled = one.num_parts < least;
  if (going) $("learning").value = going.done;
  const left = going && going.left_s !== null ? `, about ${going.left_s > 90 ? `${Math.ceil(going.left_s / 60)} min` : `${Math.ceil(going.left_s)} s`} left` : "";
  text("learn-told", going ? `${going.stage}: ${Math.round(100 * going.done)} %${left} · ${going.memory_mib} MiB`
    : one.num_parts < least ? `${least - one.num_parts} more good parts are needed at least; thirty are better`
      : one.learnt ? `learnt from ${many(one.learnt.photographs.length, "photograph")}${one.learnt.marks ? ` and ${countMarks(one.learnt.marks.num_good_marks, one.learnt.marks.num_bad_marks)}` : ""}, ${new Date(one.learnt.at).toLocaleString()}${good + bad ? `; ${countMarks(good, bad)} now` : ""}` : "");
}

$("learn").addEventListener("click", () => teach("learn", { prior: prior() }, "It learns. The line goes on inspecting."));
$("prior").addEventListener("change", () => showLearning(product()));
$("learn-marks").addEventListener("click", () => teach("learn", { marks: true, prior: prior() }, "It learns from what was marked as well. The line goes on inspecting."));
$("learn-cancel").addEventListener("click", () => teach("cancel", {}, "Learning ends."));

// Begin and choose.

$("begin").addEventListener("click", () => { $("begin-form").hidden = false; $("begin-name").focus(); });
$("begin-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = $("begin-name").value.trim();
  const camera = isShown("begin-cameras") ? $("begin-camera").value : undefined;
  if (!(await teach("new", { product: name, camera }, `${name}: begun.`))) return;
  $("begin-name").value = "";
  $("begin-form").hidden = true;
  chooseProduct(name);
});

function chooseProduct(name) {
  chosenProduct = name;
  sessionStorage.setItem("taught", name);
  chosenPhotographs.clear();
  showTeaching();
}

$("taught").addEventListener("change", () => chooseProduct($("taught").value));
