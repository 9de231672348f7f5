// How far the review has come, whether it is worth going on, and what is said of it.

const LAST = 50;  // decisions by which the yield is told
const WRONG_WITHOUT_RATE = 0.04;  // the share at which to stop where the features cannot say how many labels are wrong

function showProgress() {
  const numbers = countStates(), done = rows.length - numbers.undecided;
  fillStates(numbers);
  byId("bar").max = Math.max(1, rows.length);
  byId("bar").value = done;
  byId("progress").textContent = `${count(done)} of ${count(rows.length)} decided`;
  byId("yield").textContent = yieldText();
  byId("undo").disabled = decisions.steps.length === 0;
  showStorage();
}

const isWrong = ({ verdict }) => verdict === "relabel" || verdict === "exclude";

/** How many of the last decisions on labels found a wrong one, and whether to go on. */
function yieldText() {
  const onLabels = [...decisions.entries]
    .filter(([row, { verdict }]) => verdict !== "conflict" && given[placeOf.get(row)] !== -1)
    .map(([, entry]) => entry);
  const last = latest(onLabels, LAST), wrong = last.filter(isWrong).length;
  if (last.length === 0) return "";
  if (last.length < LAST) return `${wrong} of the ${last.length} labels decided on were wrong.`;
  const found = `${wrong} of the last ${LAST} labels were wrong`, expected = LAST * wrongAtRandom(onLabels);
  if (review.noise_rate === null) {
    return wrong > expected ? `${found}. Go on.` : `${found}, 1 in ${1 / WRONG_WITHOUT_RATE} or fewer: a good place to stop.`;
  }
  const random = `of ${LAST} picked at random about ${Math.round(expected)} would be`;
  return wrong > expected ? `${found}; ${random}. Go on.` : `${found}; ${random}: a good place to stop.`;
}

/** The estimated share of wrong labels among those that nobody has decided on. */
function wrongAtRandom(onLabels) {
  if (review.noise_rate === null) return WRONG_WITHOUT_RATE;
  const left = review.noise_rate * review.judged - onLabels.filter(isWrong).length;
  return Math.max(0, left) / Math.max(1, review.judged - onLabels.length);
}

/** The latest of many entries, up to `number`. */
function latest(entries, number) {
  let found = [];
  for (const entry of entries) {
    found.push(entry);
    if (found.length === 4 * number) found = byTime(found).slice(0, number);
  }
  return byTime(found).slice(0, number);
}

const byTime = (entries) => entries.sort((a, b) => b.when - a.when);

/** Say where decisions are not kept. */
function showStorage() {
  const number = decisions.unsafe.size, { fault } = decisions;
  byId("storage").hidden = fault === "" || (fault === "full" && number === 0);
  const why = fault === "full" ? "The browser's storage is full" : "This browser keeps nothing for this page";
  const what = number === 0 ? "" : `, and ${number === 1 ? "1 decision is" : `${count(number)} decisions are`} in this tab alone`;
  byId("storage").textContent = `${why}${what}. Save decisions.csv before you close it.`;
}

/** What was just done, for who listens to the page too. */
function say(text) {
  byId("status").textContent = text;
}

/** What must not be overlooked. */
function notice(text) {
  byId("notice").hidden = false;
  byId("notice").firstElementChild.textContent = text;
}

function complain(error) {
  notice(error.message);
}
