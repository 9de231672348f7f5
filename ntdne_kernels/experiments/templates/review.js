// The review: deciding, moving, files, keys and buttons.

const decisions = new Decisions(review.archive);
const finder = new Finder(review.classes);
const grid = new Grid(describeCell, (at) => { view.at = at; setMode("one"); });

// Deciding

/** Decide on the current image and its group: a verdict, or the class that they show. */
function decide({ verdict, shows }) {
  const place = currentPlace();
  if (place === undefined) return;
  const when = Date.now(), changes = new Map();
  for (const each of view.scopes[view.scope]) {
    const kept = shows === className(given[each]);
    changes.set(rows[each], { verdict: verdict ?? (kept ? "keep" : "relabel"), decided: shows ?? "", when });
  }
  decisions.change(changes);
  advance();
  const what = decisionText(changes.get(rows[place]));
  say(`Decided: ${what}${changes.size > 1 ? `, of ${images(changes.size)}` : ""}`);
}

function keep() {
  const place = currentPlace();
  if (place === undefined) return;
  if (given[place] < 0) say("It has no label to keep: accept the suggestion, or choose a class.");
  else decide({ shows: className(given[place]) });
}

function accept() {
  const place = currentPlace();
  if (place !== undefined && suggested[place] >= 0) decide({ shows: className(suggested[place]) });
}

/** Ask for a class: the suggested one and those of the neighbours are offered first. */
async function chooseClass() {
  const place = currentPlace();
  if (place === undefined) return;
  const { neighbours } = await detailsOf(place);
  const near = await Promise.all(neighbours.map(({ row }) => imageOf(row)));
  const likely = [suggested[place], ...near.map((image) => image.given)].filter((code) => code >= 0 && code !== given[place]);
  finder.ask(likely.map(className), (name) => decide({ shows: name }));
}

/** To the next image that still passes the filters, from the beginning if there is none behind. */
function advance() {
  const passes = filter(), open = (place, at) => at !== view.at && passes(place);
  const behind = view.places.findIndex((place, at) => at > view.at && open(place, at));
  const first = byId("state").value === "all" ? -1 : view.places.findIndex(open);
  go(behind >= 0 ? behind : first >= 0 ? first : view.places.length);
}

function undo() {
  const undone = decisions.undo();
  if (undone.length === 0) return say("There is nothing to undo.");
  const place = placeOf.get(undone[0].row), at = view.places.indexOf(place);
  if (at >= 0) go(at);
  else select(place);
  const ofFiles = undone[0].after.read ? "what was read from files, " : "";
  say(`Undone: ${ofFiles}${images(undone.length)}`);
}

// Moving and showing

/** Select what passes the filters. */
function select(place) {
  view.places = Int32Array.from(rows.keys()).filter(filter());
  go(Math.max(0, view.places.indexOf(place)));
}

function go(at) {
  view.at = Math.max(0, Math.min(at, view.places.length));
  view.scope = "image";
  show();
}

function setMode(mode) {
  view.mode = mode;
  byId("mode").querySelector("span").textContent = mode === "one" ? "Grid" : "One";
  window.scrollTo(0, 0);
  show();
}

/** Show the current image, or the grid around it, and all that depends on decisions. */
function show() {
  const place = currentPlace(), atEnd = place === undefined, drawing = ++view.shown;
  view.scopes = atEnd ? {} : scopesOf(place);
  showProgress();
  byId("one").hidden = atEnd || view.mode !== "one";
  byId("grid").hidden = atEnd || view.mode !== "grid";
  byId("end").hidden = !atEnd;
  byId("verdicts").classList.toggle("at-end", atEnd);
  if (atEnd) return showEndOfSelection();
  showButtons(place);
  if (view.mode === "grid") {
    grid.show(view.places, view.at);
  } else {
    const entry = decisions.entries.get(rows[place]);
    showOne(place, positionText(place), entry, view.scopes[view.scope], () => drawing === view.shown).then(prefetch, complain);
  }
}

function positionText(place) {
  const what = given[place] < 0 ? ", without a label" : place < review.suspects || !review.judging ? "" : ", not a suspect";
  return `${count(view.at + 1)} of ${count(view.places.length)} in this selection${what}`;
}

/** The pictures that come next. */
async function prefetch() {
  const next = view.places[view.at + 1];
  if (next === undefined) return;
  const { neighbours } = await detailsOf(next);
  for (const row of [rows[next], ...neighbours.map((each) => each.row)]) {
    const { picture } = await imageOf(row);
    if (picture) new Image().src = picture;
  }
}

function showButtons(place) {
  const number = view.scopes[view.scope].length, all = number > 1 ? `all ${count(number)}: ` : "";
  const contested = suggested[place] !== given[place] && suggested[place] >= 0;
  const set = (id, text, enabled) => {
    byId(id).querySelector("span").textContent = text;
    byId(id).disabled = !enabled;
  };
  showScopes(place);
  set("keep", given[place] < 0 ? "✓ Keep" : `✓ ${all}keep ${quoted(className(given[place]))}`, given[place] >= 0);
  set("accept", contested ? `→ ${all}${quoted(className(suggested[place]))}` : "→ no suggestion", contested);
}

function showEndOfSelection() {
  const left = countStates().undecided;
  byId("scopes").hidden = true;
  showEnd(decisions, left, [
    ["Save decisions.csv", () => save().catch(complain)],
    [left ? "Show all undecided images" : "Show all images", () => {
      byId("state").value = left ? "undecided" : "all";
      byId("given").value = byId("confusion").value = "any";
      select();
    }],
  ]);
}

function describeCell(place) {
  const entry = decisions.entries.get(rows[place]);
  const labels = `labelled ${quoted(className(given[place]))}, suggested ${quoted(className(suggested[place]))}`;
  return {
    sign: entry ? decisionText(entry) : "",
    verdict: entry?.verdict ?? "",
    inScope: view.scope !== "image" && view.scopes[view.scope].includes(place),
    text: `${labels}, ${decisionText(entry)}`,
  };
}

// Files

async function save() {
  const text = await toCsv(decisions.entries);
  const link = element("a", { download: "decisions.csv", href: URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  decisions.exported();
  showStorage();
  say(`Saved: ${count(parseCsv(text).length - 1)} decisions`);
}

/** Read files of decisions: all of them, or none where one is wrong. */
async function read(files) {
  const rowByName = await rowsByName(), found = [];
  for (const file of files) {
    try {
      found.push({ name: file.name, entries: await readDecisions(await file.text(), rowByName) });
    } catch (error) {
      return notice(`Nothing was read: ${file.name}: ${error.message}`);
    }
  }
  const { changes, added, agreed, conflicts } = mergeDecisions(found, decisions.entries, Date.now());
  decisions.change(changes);
  for (const { verdict, decided } of changes.values()) if (verdict === "relabel") finder.add(decided);
  notice(`Read ${files.map((file) => file.name).join(", ")}: ${count(added)} new decisions, `
    + `${count(agreed)} that were here already, ${count(conflicts)} conflicts`
    + (conflicts ? ", which stay undecided: “! conflicts” under “Show” has them." : "."));
  select(currentPlace());
}

// Keys and buttons

const KEYS = {
  k: keep,
  a: accept,
  c: () => chooseClass().catch(complain),
  t: () => decide({ verdict: "unsure" }),
  x: () => decide({ verdict: "exclude" }),
  u: undo,
  g: () => setMode(view.mode === "one" ? "grid" : "one"),
  s: () => save().catch(complain),
  r: () => byId("files").click(),
  f: () => byId("state").focus(),
  "?": () => byId("keys").showModal(),
  1: () => setScope("image"),
  2: () => setScope("confusion"),
  3: () => setScope("copies"),
  Escape: () => { setScope("image"); byId("main").focus(); },
  ArrowRight: () => go(view.at + 1),
  ArrowLeft: () => go(view.at - 1),
};
const GRID_KEYS = {
  ArrowDown: () => go(Math.min(view.at + grid.columns, view.places.length - 1)),
  ArrowUp: () => go(view.at < grid.columns ? view.at : view.at - grid.columns),
  Enter: () => setMode("one"),
};
const BUTTONS = { keep: "k", accept: "a", other: "c", unsure: "t", exclude: "x", undo: "u", mode: "g", save: "s", read: "r",
  help: "?", previous: "ArrowLeft", next: "ArrowRight" };

function press(event) {
  if (document.querySelector("dialog[open]") || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z" && !event.shiftKey) undo();
    return;
  }
  // A dialog that has just been closed keeps the focus until the next frame: its keys are for the page already.
  if (event.target.matches(":not(dialog *):is(select, input)") && key !== "Escape") return;
  const inGrid = view.mode === "grid" && !event.target.matches("button:not(.cell)");
  const action = KEYS[key] ?? (inGrid ? GRID_KEYS[key] : undefined);
  if (action === undefined) return;
  event.preventDefault();
  action();
}

function listen() {
  let pointer = false;
  document.addEventListener("keydown", press);
  for (const [id, key] of Object.entries(BUTTONS)) byId(id).addEventListener("click", KEYS[key]);
  byId("dismiss").addEventListener("click", () => { byId("notice").hidden = true; });
  byId("files").addEventListener("change", () => {
    read([...byId("files").files]).catch(complain).finally(() => { byId("files").value = ""; });
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("pointerdown", () => { pointer = true; });
  byId("filters").addEventListener("keydown", () => { pointer = false; });
  byId("filters").addEventListener("change", () => {
    select();
    if (pointer) byId("main").focus();  // the next key is a decision, not a choice in the list
  });
  window.addEventListener("beforeunload", (event) => { if (decisions.unsafe.size) event.preventDefault(); });
  decisions.heard = show;
}

function start() {
  fillStates(countStates());
  fillFilters();
  for (const entry of decisions.entries.values()) if (entry.verdict === "relabel") finder.add(entry.decided);
  document.body.classList.toggle("names-only", !review.pictures);
  if (review.doubt) {
    byId("doubt").hidden = false;
    const [summary, reason] = byId("doubt").children;
    summary.textContent = review.judging ? "Many of the suspects may be right labels." : "This is a review of the ranking: no label is called a suspect.";
    reason.textContent = `How many labels are wrong cannot be said from these features: ${review.doubt}.`;
  }
  listen();
  select();
}

start();
