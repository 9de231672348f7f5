// Finding a class by typing a part of its name; a name that is no class yet makes one.

const MAX_FOUND = 50;
const plain = (name) => name.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

class Finder {
  constructor(names) {
    this.names = [...names];  // of all classes, new ones at the end
    this.plain = this.names.map(plain);
    this.recent = [];
    this.dialog = byId("finder");
    this.wanted = byId("wanted");
    this.list = byId("found");
    this.wanted.addEventListener("input", () => this.find());
    this.wanted.addEventListener("keydown", (event) => this.press(event));
    this.dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.take(this.options[this.at]);
    });
    byId("leave").addEventListener("click", () => this.dialog.close());
  }

  /** Ask for a class; those that are likely are offered before anything is typed. */
  ask(likely, chosen) {
    this.likely = likely;
    this.chosen = chosen;
    this.wanted.value = "";
    this.dialog.showModal();
    this.wanted.focus();
    this.find();
  }

  add(name) {
    if (this.names.includes(name)) return;
    this.names.push(name);
    this.plain.push(plain(name));
  }

  find() {
    const text = this.wanted.value.trim();
    this.options = text === "" ? this.offered() : this.matching(text);
    this.list.replaceChildren(...this.options.map(({ name, isNew }, place) => {
      const option = element("li", { role: "option", id: `option-${place}`, "aria-selected": "false" },
        ...(isNew ? ["new class: "] : []), label(name));
      option.addEventListener("click", () => this.take(this.options[place]));
      return option;
    }));
    this.select(0);
  }

  offered() {
    const first = [...new Set([...this.likely, ...this.recent])];
    const others = this.names.slice(0, MAX_FOUND + first.length).filter((name) => !first.includes(name));
    return [...first, ...others].slice(0, MAX_FOUND).map((name) => ({ name }));
  }

  /** Names that begin with the text, those in which a word does, and those that hold it, each in order. */
  matching(text) {
    const wanted = plain(text), ranks = [[], [], []];
    this.plain.forEach((name, place) => {
      const at = name.indexOf(wanted);
      if (at < 0) return;
      ranks[at === 0 ? 0 : /[\p{L}\p{N}]/u.test(name[at - 1]) ? 2 : 1].push({ name: this.names[place] });
    });
    const exact = ranks.flat().filter(({ name }) => name === text);
    const others = ranks.flat().filter(({ name }) => name !== text).slice(0, MAX_FOUND);
    return [...exact, ...others, ...(exact.length ? [] : [{ name: text, isNew: true }])];
  }

  press(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1 };
    if (!(event.key in moves) || this.options.length === 0) return;
    event.preventDefault();
    this.select((this.at + moves[event.key] + this.options.length) % this.options.length);
  }

  select(at) {
    this.list.children[this.at]?.setAttribute("aria-selected", "false");
    this.at = at;
    const option = this.list.children[at];
    if (!option) return;
    option.setAttribute("aria-selected", "true");
    this.wanted.setAttribute("aria-activedescendant", option.id);
    option.scrollIntoView({ block: "nearest" });
  }

  take(option) {
    if (option === undefined) return;
    this.add(option.name);
    this.recent = [option.name, ...this.recent.filter((name) => name !== option.name)].slice(0, 5);
    this.dialog.close();
    this.chosen(option.name);
  }
}
