"use strict";
// What is reviewed: data/index.js at once, the other files of data/ when they are wanted.
// A row is an image's number in the archive, a place its number in the review, a code that of a class (-1: no label).

const review = received.index;
const rows = Int32Array.from(review.rows);
const given = Int32Array.from(review.given);
const suggested = Int32Array.from(review.suggested);
const placeOf = new Map(review.rows.map((row, place) => [row, place]));
const copiesOf = new Map(review.copies.flatMap((group) => group.map((place) => [place, group])));

const loading = new Map();

/** The content of a file of data/, read once. Scripts may be loaded where fetch may not. */
function load(name) {
  if (!loading.has(name)) {
    loading.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => { script.remove(); resolve(received[name]); };
      script.onerror = () => {
        script.remove();
        loading.delete(name);
        reject(new Error(`data/${name}.js cannot be read. The page needs the whole folder that it came in.`));
      };
      document.head.append(script);
    }));
  }
  return loading.get(name);
}

/** What is known of a row: its name, the code of its label, and the file of its picture, "" for none. */
async function imageOf(row) {
  const part = Math.floor(row / review.chunk), at = row % review.chunk;
  const chunk = await load(`images-${part}`);
  const picture = chunk.formats[at] && `pictures/${part}/${row}${chunk.formats[at]}`;
  return { row, name: chunk.names[at], given: chunk.given[at], picture };
}

/** The shares of a place's label and suggestion, and its neighbours as rows with their similarities. */
async function detailsOf(place) {
  const chunk = await load(`details-${Math.floor(place / review.chunk)}`), at = place % review.chunk;
  return {
    labelShare: chunk.label_share[at],
    suggestedShare: chunk.suggested_share[at],
    neighbours: chunk.neighbours[at].map((row, k) => ({ row, similarity: chunk.similarity[at][k] })),
  };
}

/** Row by name, of the whole archive. */
async function rowsByName() {
  const parts = Array.from({ length: Math.ceil(review.images / review.chunk) }, (_, part) => load(`images-${part}`));
  const found = new Map();
  (await Promise.all(parts)).forEach((chunk, part) =>
    chunk.names.forEach((name, at) => found.set(name, part * review.chunk + at)));
  return found;
}

/** The name of a class, "" for no label. */
function className(code) {
  return code < 0 ? "" : review.classes[code];
}
