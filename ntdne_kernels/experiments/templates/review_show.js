// How an image, its labels and its decision are shown. Names may be any text: they are set as text, never as HTML.

const SIGNS = { keep: "✓", relabel: "→", unsure: "?", exclude: "✕", conflict: "!" };
const SAID = { keep: "kept", relabel: "other label", unsure: "cannot tell", exclude: "excluded", conflict: "conflict" };
const RELATIONS = { same: "=", different: "≠", unknown: "?" };
const MAX_STRIP = 24;  // pictures of a group

const byId = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");
const images = (number) => number === 1 ? "1 image" : `${count(number)} images`;

/** An element with attributes, of which `text` is its text, and with children. */
function element(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** The name of a class in an element of its own, as names may be written from right to left. */
function label(name) {
  return name === "" ? element("em", { text: "no label" }) : element("bdi", { text: name, class: "label" });
}

/** The name of a class within a text. */
function quoted(name) {
  return name === "" ? "no label" : `“${isolated(name)}”`;
}

/** The name of a class so that its direction of writing does not turn the text around it. */
function isolated(name) {
  return name === "" ? "no label" : `\u2068${name}\u2069`;
}

function pictureOf(image, alt) {
  return image.picture
    ? element("img", { src: image.picture, alt, draggable: "false" })
    : element("span", { class: "missing", text: review.pictures ? "no picture" : image.name, title: image.name });
}

/** What was decided, in words. */
function decisionText(entry) {
  if (entry === undefined) return "undecided";
  return `${SIGNS[entry.verdict]} ${entry.verdict === "relabel" ? quoted(entry.decided) : SAID[entry.verdict]}`;
}

/** The image of a place, its neighbours, and what is decided; `group` are the places that the next decision is for. */
async function showOne(place, position, entry, group, isCurrent) {
  const [image, details] = await Promise.all([imageOf(rows[place]), detailsOf(place)]);
  const [neighbours, strip] = await Promise.all([
    Promise.all(details.neighbours.map(async (each) => ({ ...each, ...await imageOf(each.row) }))),
    Promise.all(group.slice(0, MAX_STRIP).map((each) => imageOf(rows[each]))),
  ]);
  if (!isCurrent()) return;
  const facts = element("div", { class: "facts" },
    element("p", { class: "position", text: position }),
    element("p", { class: "path" }, element("bdi", { text: image.name })),
    share("Labelled", className(given[place]), details.labelShare),
    suggested[place] < 0 ? "" : suggested[place] === given[place]
      ? element("p", { text: "No other label is suggested: its own has the largest share." })
      : share("Suggested", className(suggested[place]), details.suggestedShare),
    element("p", { class: `decision ${entry ? entry.verdict : ""}`, text: decisionText(entry) }));
  if (entry && entry.verdict === "conflict") facts.append(conflictOf(entry));
  const near = element("ul", { class: "neighbours", "aria-label": "The images most like it" },
    ...neighbours.map((each) => neighbourOf(each, place)));
  byId("one").replaceChildren(
    element("figure", { class: "large" }, pictureOf(image, `image ${image.name}`)), facts,
    element("div", { class: "near-them" }, element("h2", { text: "The images most like it" }), near,
      ...(group.length > 1 ? stripOf(strip, group.length) : [])));
}

/** A label with its share as a bar and a number. */
function share(what, name, value) {
  const percent = value === null ? "not known" : `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
  const bar = element("span", { class: "bar", "aria-hidden": "true" }, element("span"));
  bar.firstChild.style.width = `${100 * (value ?? 0)}%`;
  return element("div", { class: `share ${what.toLowerCase()}` },
    element("span", { text: what }), element("strong", {}, label(name)),
    ...(name === "" ? [] : [bar, element("span", { text: percent, title: "its share of what the other images say" })]));
}

function neighbourOf(image, place) {
  const compared = given[place] < 0 ? suggested[place] : given[place];
  const relation = image.given < 0 ? "unknown" : image.given === compared ? "same" : "different";
  const name = className(image.given);
  return element("li", { class: relation, title: image.name },
    pictureOf(image, `neighbour ${image.name}`),
    element("span", { class: "caption" }, `${RELATIONS[relation]} `, label(name), element("br"),
      image.similarity === null ? "" : image.similarity.toFixed(3)));
}

/** What each of several people said. */
function conflictOf(entry) {
  return element("ul", { class: "said" }, ...entry.said.map((each) =>
    element("li", { text: `${each.file}: ${decisionText(each)}` })));
}

/** The pictures of a group that is decided at once. */
function stripOf(shown, size) {
  const more = size > shown.length ? ` (the first ${shown.length} are shown)` : "";
  return [
    element("h2", { text: `The next decision is for these ${images(size)}${more}` }),
    element("ul", { class: "strip" }, ...shown.map((image) =>
      element("li", { title: image.name }, pictureOf(image, `image ${image.name}`)))),
  ];
}

/** What was done, where there is no image left to show. */
function showEnd(decisions, left, actions) {
  const counts = Object.fromEntries(Object.keys(SIGNS).map((verdict) => [verdict, 0]));
  for (const [, entry] of decisions.entries) counts[entry.verdict]++;
  const lines = Object.entries(counts).filter(([, number]) => number > 0)
    .map(([verdict, number]) => element("li", { text: `${SIGNS[verdict]} ${SAID[verdict]}: ${count(number)}` }));
  byId("end").replaceChildren(
    element("h2", { text: left ? "That was the last one of this selection." : "Every image of the review is decided." }),
    element("p", { text: left ? `${images(left)} of the review are undecided.` : "Save decisions.csv, if you have not yet." }),
    element("ul", { class: "counts" }, ...lines),
    element("p", { text: "What follows: “ntdne relabel” makes a corrected list of labels or folders of decisions.csv." }),
    element("div", { class: "tools" }, ...actions.map(([text, action]) => {
      const button = element("button", { type: "button", text });
      button.addEventListener("click", action);
      return button;
    })));
}
