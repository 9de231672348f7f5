// Which images are selected by the filters, and which of them the next decision is for.

const MAX_OPTIONS = 500;  // of a filter

const view = {
  mode: "one",
  places: new Int32Array(),  // the selection: who decides keeps its images at hand until the filters change
  at: 0,  // the position in it; its length: the end
  scope: "image",
  scopes: {},  // the places of each scope
  shown: 0,  // times that the page was drawn
};

const currentPlace = () => view.places[view.at];

function stateOf(place) {
  return decisions.entries.get(rows[place])?.verdict ?? "undecided";
}

/** Whether a place passes the filters as they are now; conflicts are undecided too. */
function filter() {
  const [state, label, pair] = ["state", "given", "confusion"].map((id) => byId(id).value);
  return (place) => {
    const now = stateOf(place);
    return (state === "all" || state === now || (state === "undecided" && now === "conflict"))
      && (label === "any" || given[place] === Number(label))
      && (pair === "any" || pair === `${given[place]} ${suggested[place]}`);
  };
}

/** The options of a filter: the most frequent of the values, with their numbers. */
function fillFilter(id, any, values, text) {
  const numbers = new Map();
  for (const value of values) numbers.set(value, (numbers.get(value) ?? 0) + 1);
  const most = [...numbers].sort(([, a], [, b]) => b - a);
  byId(id).replaceChildren(element("option", { value: "any", text: any }), ...most.slice(0, MAX_OPTIONS).map(
    ([value, number]) => element("option", { value, text: `${text(value)} (${count(number)})` })));
  if (most.length > MAX_OPTIONS) {
    byId(id).append(element("option", { disabled: "", text: `these are the ${MAX_OPTIONS} most frequent` }));
  }
}

function fillFilters() {
  fillFilter("given", "any", given, (code) => isolated(className(code)));
  const contested = [...rows.keys()].filter((place) => given[place] !== suggested[place] && given[place] >= 0);
  fillFilter("confusion", "any", contested.map((place) => `${given[place]} ${suggested[place]}`),
    (pair) => pair.split(" ").map((code) => isolated(className(Number(code)))).join(" → "));
}

/** The options of the filter by state, with how many images are in each. */
function fillStates(numbers) {
  const names = { all: "all", undecided: "undecided", keep: "✓ kept", relabel: "→ other label", unsure: "? cannot tell",
    exclude: "✕ excluded", conflict: "! conflicts" };
  const list = byId("state");
  if (list.options.length === 0) {
    list.append(...Object.keys(names).map((value) => element("option", { value })));
    list.value = "undecided";
  }
  for (const option of list.options) option.textContent = `${names[option.value]} (${count(numbers[option.value])})`;
}

/** How many images of the review are in each state; conflicts are counted as undecided too. */
function countStates() {
  const numbers = { all: rows.length, undecided: 0, keep: 0, relabel: 0, unsure: 0, exclude: 0, conflict: 0 };
  for (let place = 0; place < rows.length; place++) numbers[stateOf(place)]++;
  numbers.undecided += numbers.conflict;
  return numbers;
}

/** The places of each scope: the current one, with the undecided ones of its label and suggestion, or with its copies. */
function scopesOf(place) {
  const isOpen = (each) => each !== place && !decisions.entries.has(rows[each]);
  const scopes = { image: [place], confusion: [place], copies: [place] };
  for (let each = 0; each < rows.length; each++) {
    if (given[each] === given[place] && suggested[each] === suggested[place] && isOpen(each)) scopes.confusion.push(each);
  }
  scopes.copies.push(...(copiesOf.get(place) ?? []).filter(isOpen));
  return scopes;
}

function setScope(scope) {
  if (currentPlace() === undefined) return;
  view.scope = view.scopes[scope].length > 1 ? scope : "image";
  show();
}

function showScopes(place) {
  const { confusion, copies } = view.scopes, others = copies.length - 1;
  const label = given[place] < 0 ? "without a label" : quoted(className(given[place]));
  const pair = suggested[place] === given[place] ? ", nothing else suggested" : ` → ${quoted(className(suggested[place]))}`;
  const texts = {
    image: "this image",
    confusion: `all ${count(confusion.length)} ${label}${pair}`,
    copies: `it and its ${others === 1 ? "copy" : `${count(others)} copies`}`,
  };
  const shown = Object.keys(texts).filter((scope) => scope === "image" || view.scopes[scope].length > 1);
  byId("scopes").hidden = shown.length === 1;
  byId("scopes").replaceChildren(element("span", { text: "Decide for" }), ...shown.map((scope) => {
    const key = String(Object.keys(texts).indexOf(scope) + 1), pressed = String(scope === view.scope);
    const button = element("button", { type: "button", "aria-pressed": pressed, "aria-keyshortcuts": key },
      element("kbd", { text: key }), ` ${texts[scope]}`);
    button.addEventListener("click", () => setScope(scope));
    return button;
  }));
}
