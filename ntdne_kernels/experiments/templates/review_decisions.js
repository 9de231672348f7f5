// Decisions and where they are kept: in localStorage under a key for each image, so that two tabs, or the review of a
// later audit of the same archive, never overwrite each other's.
//
// An entry has a verdict, the decided class ("" for none) and when (milliseconds); a conflict also what each file said.

const LETTERS = { keep: "k", relabel: "r", unsure: "u", exclude: "x", conflict: "c" };

/** An entry as text. It is short, as browsers keep some 5 million characters: enough for 100,000 decisions. */
function entryToText({ verdict, decided, when, said }) {
  return `${LETTERS[verdict]}${when.toString(36)} ${verdict === "conflict" ? JSON.stringify(said) : decided}`;
}

function entryFromText(text) {
  const verdict = Object.keys(LETTERS).find((name) => LETTERS[name] === text[0]), space = text.indexOf(" ");
  const when = parseInt(text.slice(1, space), 36), rest = text.slice(space + 1);
  return verdict === "conflict" ? { verdict, decided: "", when, said: JSON.parse(rest) } : { verdict, decided: rest, when };
}

class Decisions {
  constructor(archive) {
    this.prefix = `review/${archive}/`;
    this.entries = new Map();  // by row
    this.steps = [];  // what undo takes back: lists of { row, before, after }
    this.unsafe = new Set();  // rows whose entry is neither in the storage nor in a saved file
    this.fault = "";  // why the storage takes nothing
    this.heard = () => {};  // called when another tab has decided
    this.open();
    window.addEventListener("storage", (event) => this.hear(event));
  }

  /** Read what is stored; steps are what was decided at the same time. */
  open() {
    try {
      this.stored = window.localStorage;
      for (const key of Object.keys(this.stored)) {
        if (key.startsWith(this.prefix)) this.entries.set(this.rowOf(key), entryFromText(this.stored.getItem(key)));
      }
    } catch {
      this.stored = null;
    }
    if (!this.stored) this.fault = "blocked";
    const byTime = new Map();
    for (const [row, after] of [...this.entries].sort(([, a], [, b]) => a.when - b.when)) {
      if (after.verdict === "conflict") continue;
      if (!byTime.has(after.when)) byTime.set(after.when, []);
      byTime.get(after.when).push({ row, before: undefined, after });
    }
    this.steps = [...byTime.values()];
  }

  rowOf(key) {
    return Number(key.slice(this.prefix.length));
  }

  /** Another tab has decided. */
  hear(event) {
    if (event.storageArea !== this.stored) return;
    if (event.key === null) {  // the storage was emptied: what is here is written again
      for (const [row, entry] of this.entries) this.put(row, entry);
    } else if (event.key.startsWith(this.prefix)) {
      const row = this.rowOf(event.key);
      if (event.newValue === null) this.entries.delete(row);
      else this.entries.set(row, entryFromText(event.newValue));
    } else {
      return;
    }
    this.heard();
  }

  /** Change the entries of rows, as one step of undo. */
  change(entries) {
    const step = [...entries].map(([row, after]) => ({ row, before: this.entries.get(row), after }));
    if (step.length === 0) return;
    for (const { row, after } of step) this.put(row, after);
    this.steps.push(step);
  }

  /** Take the last step back, but for rows that were changed since by another tab; gives its rows, none if there is none. */
  undo() {
    while (this.steps.length) {
      const step = this.steps.pop().filter(({ row, after }) => this.entries.get(row) === after);
      for (const { row, before } of step) this.put(row, before);
      if (step.length) return step.map(({ row }) => row);
    }
    return [];
  }

  put(row, entry) {
    if (entry === undefined) this.entries.delete(row);
    else this.entries.set(row, entry);
    try {
      if (entry === undefined) this.stored.removeItem(this.prefix + row);
      else this.stored.setItem(this.prefix + row, entryToText(entry));
      this.unsafe.delete(row);
    } catch {
      if (this.stored) this.fault = "full";
      this.unsafe.add(row);
    }
  }

  /** A file has all that is decided here. */
  exported() {
    this.unsafe.clear();
  }
}
