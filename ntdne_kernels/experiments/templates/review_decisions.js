// Decisions and where they are kept: in localStorage under the archive's id, so that the review of a later audit of the
// same labels has them too. A key holds those of 100 rows: some 100,000 decisions then fit into the 5 million characters
// that browsers give, where a key for each would take more space and time. What is stored is read anew before it is
// changed, so that two tabs do not overwrite each other's decisions.
//
// An entry has a verdict, the decided class ("" for none), when (milliseconds), and `read` where it came from a file; a
// conflict also what each file said.

const BLOCK = 100;  // rows of a key
const LETTERS = { keep: "k", relabel: "r", unsure: "u", exclude: "x", conflict: "c" };  // capitals: read from a file

function entryToText({ verdict, decided, when, read, said }) {
  return `${read ? LETTERS[verdict].toUpperCase() : LETTERS[verdict]}${when.toString(36)} ${verdict === "conflict" ? JSON.stringify(said) : decided}`;
}

function entryFromText(text) {
  const letter = text[0].toLowerCase(), read = letter !== text[0], space = text.indexOf(" ");
  const verdict = Object.keys(LETTERS).find((name) => LETTERS[name] === letter);
  const when = parseInt(text.slice(1, space), 36), rest = text.slice(space + 1);
  return verdict === "conflict" ? { verdict, decided: "", when, read, said: JSON.parse(rest) } : { verdict, decided: rest, when, read };
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

  /** Read what is stored; steps are what was decided here at the same time. What was read from files stays. */
  open() {
    try {
      this.stored = window.localStorage;
      for (const key of Object.keys(this.stored)) if (key.startsWith(this.prefix)) this.take(key, this.stored.getItem(key));
    } catch {
      this.stored = null;
    }
    if (!this.stored) this.fault = "blocked";
    const byTime = new Map();
    for (const [row, after] of [...this.entries].sort(([, a], [, b]) => a.when - b.when)) {
      if (after.read) continue;
      if (!byTime.has(after.when)) byTime.set(after.when, []);
      byTime.get(after.when).push({ row, before: undefined, after });
    }
    this.steps = [...byTime.values()];
  }

  /** Take over the entries of a key, but for rows that the storage did not take from here. */
  take(key, text) {
    const first = Number(key.slice(this.prefix.length)) * BLOCK, texts = JSON.parse(text ?? "{}");
    for (let row = first; row < first + BLOCK; row++) {
      const now = texts[row - first], mine = this.entries.get(row);
      if (this.unsafe.has(row) || now === (mine && entryToText(mine))) continue;
      if (now === undefined) this.entries.delete(row);
      else this.entries.set(row, entryFromText(now));
    }
  }

  /** Another tab has decided. */
  hear(event) {
    if (!this.stored || event.storageArea !== this.stored) return;
    if (event.key === null) this.write([...this.entries.keys()]);  // the storage was emptied
    else if (event.key.startsWith(this.prefix)) this.take(event.key, event.newValue);
    else return;
    this.heard();
  }

  /** Change the entries of rows, as one step of undo. */
  change(entries) {
    const step = [...entries].map(([row, after]) => ({ row, before: this.entries.get(row), after }));
    if (step.length === 0) return;
    this.put(step.map(({ row, after }) => [row, after]));
    this.steps.push(step);
  }

  /** Take the last step back, but for rows that were changed since by another tab; gives it, [] if there is none. */
  undo() {
    while (this.steps.length) {
      const step = this.steps.pop().filter(({ row, after }) => this.entries.get(row) === after);
      this.put(step.map(({ row, before }) => [row, before]));
      if (step.length) return step;
    }
    return [];
  }

  put(changes) {
    for (const [row, entry] of changes) {
      if (entry === undefined) this.entries.delete(row);
      else this.entries.set(row, entry);
    }
    this.write(changes.map(([row]) => row));
  }

  /** Store the entries of rows beside what others have stored. */
  write(changed) {
    const blocks = new Map();
    for (const row of changed) {
      const block = Math.floor(row / BLOCK);
      if (!blocks.has(block)) blocks.set(block, []);
      blocks.get(block).push(row);
    }
    for (const [block, part] of blocks) {
      try {
        this.store(this.prefix + block, part);
        for (const row of part) this.unsafe.delete(row);
      } catch {
        if (this.stored) this.fault = "full";
        for (const row of part) this.unsafe.add(row);
      }
    }
  }

  store(key, part) {
    const texts = JSON.parse(this.stored.getItem(key) ?? "{}");
    for (const row of part) {
      const entry = this.entries.get(row);
      if (entry === undefined) delete texts[row % BLOCK];
      else texts[row % BLOCK] = entryToText(entry);
    }
    if (Object.keys(texts).length) this.stored.setItem(key, JSON.stringify(texts));
    else this.stored.removeItem(key);
  }

  /** A file has all that is decided here. */
  exported() {
    this.unsafe.clear();
  }
}
