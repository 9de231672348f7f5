// decisions.csv: written, read and checked. RFC 4180; cells are data, whatever a spreadsheet would make of them.

const COLUMNS = ["image", "given", "verdict", "decided", "when", "archive"];
const MAX_FAULTS = 3;  // named of a file

function csvLine(cells) {
  return cells.map((cell) => /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell).join(",") + "\n";
}

/** The text of decisions.csv, by row; conflicts are open and not in it. */
async function toCsv(entries) {
  const lines = [csvLine(COLUMNS)];
  const decided = [...entries].filter(([, entry]) => entry.verdict !== "conflict").sort(([a], [b]) => a - b);
  for (const [row, entry] of decided) {
    const image = await imageOf(row), when = entry.when ? new Date(entry.when).toISOString() : "";
    lines.push(csvLine([image.name, className(image.given), entry.verdict, entry.decided, when, review.archive]));
  }
  return lines.join("");
}

/** The records of a text, each with its line; throws where a quote is out of place. */
function parseCsv(text) {
  const cell = /(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n]*))(,|\r\n|\n|\r|$)/y;
  const records = [];
  let record = { line: 1, cells: [] }, line = 1;
  while (cell.lastIndex <= text.length) {
    const match = cell.exec(text);
    if (match === null) throw new Error(`line ${line}: a quote is out of place`);
    record.cells.push(match[1] === undefined ? match[2] : match[1].replaceAll('""', '"'));
    line += (match[0].match(/\r\n|\n|\r/g) || []).length;
    if (match[3] === ",") continue;
    if (record.cells.length > 1 || record.cells[0] !== "") records.push(record);
    record = { line, cells: [] };
    if (match[3] === "") break;
  }
  return records;
}

/** The decisions of a file by row; throws where it holds none, is wrong, or of another archive. */
async function readDecisions(text, rowByName) {
  const [header, ...records] = parseCsv(text.replace(/^\ufeff/, ""));
  const missing = COLUMNS.find((column) => !header || !header.cells.includes(column));
  if (missing) throw new Error(`no decisions: expected columns ${COLUMNS.join(",")}, found no ${missing}`);
  const at = COLUMNS.map((column) => header.cells.indexOf(column));
  const found = new Map(), faults = [];
  for (const { line, cells } of records) {
    const [image, label, verdict, decided, when, archive] = at.map((column) => cells[column] ?? "");
    const row = rowByName.get(image);
    const entry = { verdict, decided, when: when === "" ? 0 : Date.parse(when) };
    const fault = cells.length !== header.cells.length ? `expected ${header.cells.length} values`
      : faultOf(entry, label, when)
      || (archive && archive !== review.archive && `of another archive: ${archive} and not ${review.archive}`)
      || (row === undefined && `of another archive: there is no image ${image}`)
      || await (async () => {
        const expected = className((await imageOf(row)).given);
        return label !== expected && `of another archive: the label of ${image} is “${expected}” and not “${label}”`;
      })();
    if (fault) faults.push(`line ${line}: ${fault}`);
    else if (!found.has(row) || found.get(row).when <= entry.when) found.set(row, entry);
  }
  if (faults.length) {
    const more = faults.length > MAX_FAULTS ? ` and ${faults.length - MAX_FAULTS} more` : "";
    throw new Error(faults.slice(0, MAX_FAULTS).join("; ") + more);
  }
  return found;
}

/** What is wrong with a decision by itself; "" for nothing. */
function faultOf({ verdict, decided, when }, label, written) {
  if (Number.isNaN(when)) return `when: expected a time as 2026-01-31T12:34:56.789Z, found “${written}”`;
  if (!(verdict in LETTERS) || verdict === "conflict") return `verdict: expected keep, relabel, unsure or exclude, found “${verdict}”`;
  if (verdict === "keep") return decided === label && label !== "" ? "" : "decided: expected the given label for keep";
  if (verdict === "relabel") return decided !== label && decided !== "" ? "" : "decided: expected another class for relabel";
  return decided === "" ? "" : `decided: expected nothing for ${verdict}`;
}

/** What reading files changes: for each row a decision on which all agree, or a conflict with what each says.

    `files`: name and decisions of each; `mine`: what is decided here, which counts as another person's. */
function mergeDecisions(files, mine, now) {
  const changes = new Map();
  let added = 0, agreed = 0, conflicts = 0;
  for (const row of new Set(files.flatMap((file) => [...file.entries.keys()]))) {
    const own = mine.get(row);
    const said = own === undefined ? [] : own.verdict === "conflict" ? [...own.said] : [{ ...own, file: "this browser" }];
    for (const { name, entries } of files) if (entries.has(row)) said.push({ ...entries.get(row), file: name });
    const views = new Set(said.map(({ verdict, decided }) => `${verdict} ${decided}`));
    const latest = said.reduce((a, b) => b.when >= a.when ? b : a);
    if (views.size > 1) {
      changes.set(row, { verdict: "conflict", decided: "", when: now, read: true, said });
      conflicts++;
    } else if (own !== undefined) {
      agreed++;
    } else {
      changes.set(row, { verdict: latest.verdict, decided: latest.decided, when: latest.when, read: true });
      added++;
    }
  }
  return { changes, added, agreed, conflicts };
}
