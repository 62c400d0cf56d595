"use strict";
// The operator's page. Everything it shows comes from /api/events, of the camera that is chosen.

let events = null;

const statusOf = (page) => page.health.cameras.find((one) => one.camera === page.camera);

function show(page) {
  current = page;
  const status = statusOf(page);
  text("product", status.product || "no product yet");
  text("runs", [page.lights.length > 1 ? status.camera : "", status.source, status.model && `model ${status.model}`, status.provider].filter(Boolean).join(" · "));
  document.title = `${status.product || "no product yet"} – EdgeFlame`;
  showStanding(status, page.health.problem);
  showChips(page);
  showLights(page);
  showCameras(page.lights);
  showLatest(page.view.latest);
  showCounts(page.view.today);
  showChart(page.view.scores);
  showHours(page.view.hours);
  showParts("rejects", page.view.rejects);
  showParts("recent", page.view.recent);
  $("no-rejects").hidden = page.view.rejects.length > 0;
  showDrift(status.drift);
  showGolden(status.golden);
  showModels(status.models);
  showOperate(status);
  heardOfTeaching(page.teaching);
  showHealth(page.health, status);
}

function showLights(page) {
  const box = $("lights");
  box.hidden = page.lights.length < 2;
  if (box.hidden) return;
  if (box.children.length !== page.lights.length) {
    box.replaceChildren(...page.lights.map((one) => {
      const button = make("button");
      button.type = "button";
      button.append(make("span", "camera", one.camera), make("span", "word"), make("span", "why"));
      button.addEventListener("click", () => choose(one.camera));
      return button;
    }));
  }
  page.lights.forEach((one, index) => {
    const button = box.children[index];
    const { drift, paused } = page.health.cameras[index];
    const verdict = one.latest && !paused ? one.latest.verdict : "none";
    const worry = one.problem || (drift && ["warning", "alarm"].includes(drift.condition) ? drift.message : "");
    button.className = verdict;
    button.setAttribute("aria-pressed", String(one.camera === page.camera));
    const [, word, why] = button.children;
    const said = paused ? `${PAUSED_SIGN} paused` : one.latest ? `${SIGNS[verdict]} ${verdict}` : "no part";
    if (word.textContent !== said) word.textContent = said;
    const told = worry ? `⚠ ${worry}` : "ready";
    if (why.textContent !== told) why.textContent = told;
  });
}

// The verdict of every camera, in view whatever else is looked at.
function showChips(page) {
  const box = $("chips");
  const several = page.lights.length > 1;
  box.classList.toggle("several", several);
  if (box.children.length !== page.lights.length) {
    box.replaceChildren(...page.lights.map((one) => {
      const button = make("button");
      button.type = "button";
      button.append(make("small", "", several ? one.camera : ""), make("span"));
      button.addEventListener("click", () => { choose(one.camera); showTab("inspect"); });
      return button;
    }));
  }
  page.lights.forEach((one, index) => {
    const { paused } = page.health.cameras[index];
    const verdict = one.latest && !paused ? one.latest.verdict : "none";
    const trial = one.latest && one.latest.trial ? " · trial" : "";
    const said = paused ? `${PAUSED_SIGN} paused` : one.latest ? `${SIGNS[verdict]} ${verdict}${trial}` : "– no part";
    const button = box.children[index];
    button.className = verdict;
    button.setAttribute("aria-pressed", String(one.camera === page.camera));
    button.setAttribute("aria-label", `${one.camera}: ${said}`);
    if (button.lastChild.textContent !== said) button.lastChild.textContent = said;
  });
}

// The address remembers camera and tab: "#outfeed" or "#outfeed/health".
const place = () => location.hash.slice(1).split("/").map(decodeURIComponent);

function remember(camera, tab) {
  const tail = tab && tab !== "inspect" ? `/${tab}` : "";
  history.replaceState(null, "", `#${encodeURIComponent(camera || "")}${tail}`);
}

const tabs = [...document.querySelectorAll("[role=tab]")];
const onTab = {}; // what a tab does when it is shown, by its panel's id

function showTab(name) {
  const known = tabs.find((tab) => tab.getAttribute("aria-controls") === name) || tabs[0];
  const chosen = known.getAttribute("aria-controls");
  for (const tab of tabs) {
    const isChosen = tab === known;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !isChosen;
  }
  remember(place()[0], chosen);
  if (onTab[chosen]) onTab[chosen]();
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => { showTab(tab.getAttribute("aria-controls")); scrollTo(0, 0); });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    showTab(next.getAttribute("aria-controls"));
    next.focus();
  });
}

function choose(camera) {
  remember(camera, place()[1]);
  listen(camera);
}

// The line sends something at least every two seconds. Nothing for longer means that what is shown may be over,
// whatever the browser thinks of the connection: a tablet's Wi-Fi or a NAT can drop it without a word.
const SILENT_MS = 6000, REOPEN_MS = 15000;
let heard = performance.now(), opened = heard;

function listen(camera) {
  if (events) events.close();
  opened = performance.now();
  events = new EventSource(camera ? `api/events?camera=${encodeURIComponent(camera)}` : "api/events");
  events.onerror = () => { $("link").className = "down"; text("link", "connection lost, trying again"); };
  events.onmessage = (event) => {
    heard = performance.now();
    document.body.classList.remove("silent");
    $("link").className = "up";
    text("link", "live");
    show(JSON.parse(event.data));
  };
}

function watchSilence() {
  const now = performance.now(), silent = now - heard > SILENT_MS;
  document.body.classList.toggle("silent", silent);
  if (!silent) return;
  $("link").className = "down";
  text("link", `nothing heard for ${Math.round((now - heard) / 1000)} s: what is shown is old`);
  document.title = "⚠ nothing heard – EdgeFlame";
  if (now - Math.max(heard, opened) > REOPEN_MS) listen(place()[0]);
}

setInterval(watchSilence, 1000);

function refreshProducts() {
  fetch("api/line").then((response) => response.json()).then((line) => {
    $("switch").hidden = line.products.length < 2;
    $("products").replaceChildren(...line.products.map((name) => make("option", "", name)));
    if (current) $("products").value = statusOf(current).product;
  });
}

refreshProducts();

onTab.marks = () => showMarks();
onTab.teach = refreshTeaching;
showTab(place()[1]);
listen(place()[0]);
