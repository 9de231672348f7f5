// The grid: only the cells that are in view, or nearly, are in the page, whatever the number of images.

const CELL = { width: 148, height: review.pictures ? 188 : 92 };  // least width, and height, in pixels
const SPARE_ROWS = 2;  // above and below what is seen

class Grid {
  /** `describe(place)`: what a cell shows of a place; `opened(at)`: a cell was chosen. */
  constructor(describe, opened) {
    this.describe = describe;
    this.opened = opened;
    this.places = [];
    this.cells = new Map();  // by position
    this.box = byId("cells");
    this.box.addEventListener("click", (event) => {
      const cell = event.target.closest(".cell");
      if (cell) this.opened(Number(cell.dataset.at));
    });
    for (const event of ["scroll", "resize"]) {
      window.addEventListener(event, () => requestAnimationFrame(() => this.draw()), { passive: true });
    }
  }

  /** Show the places, of which that at the position `at` is the current one. */
  show(places, at) {
    const focused = this.box.contains(document.activeElement) || document.activeElement === document.body;
    if (places !== this.places) this.clear();
    this.places = places;
    this.current = at;
    this.draw();
    this.reveal(at);
    for (const [each, cell] of this.cells) this.fill(cell, each);
    if (focused) this.cells.get(at).focus({ preventScroll: true });
  }

  clear() {
    this.cells.clear();
    this.box.replaceChildren();
  }

  draw() {
    if (byId("grid").hidden) return;
    const columns = Math.max(2, Math.floor(this.box.clientWidth / CELL.width));
    if (columns !== this.columns) this.clear();
    this.columns = columns;
    this.box.style.height = `${Math.ceil(this.places.length / columns) * CELL.height}px`;
    const top = -this.box.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(top / CELL.height) - SPARE_ROWS) * columns;
    const last = Math.min(this.places.length, (Math.ceil((top + window.innerHeight) / CELL.height) + SPARE_ROWS) * columns);
    for (const [at, cell] of this.cells) {
      if ((at < first || at >= last) && at !== this.current) {
        cell.remove();
        this.cells.delete(at);
      }
    }
    for (let at = first; at < last; at++) this.add(at);
  }

  add(at) {
    if (this.cells.has(at) || at >= this.places.length) return;
    const cell = element("button", { type: "button", class: "cell", "data-at": at, tabindex: "-1" });
    cell.style.width = `${100 / this.columns}%`;
    cell.style.height = `${CELL.height}px`;
    cell.style.left = `${100 * (at % this.columns) / this.columns}%`;
    cell.style.top = `${Math.floor(at / this.columns) * CELL.height}px`;
    this.cells.set(at, cell);
    this.box.append(cell);
    this.fill(cell, at);
  }

  async fill(cell, at) {
    const place = this.places[at], { verdict, inScope } = this.describe(place);
    cell.className = `cell ${verdict} ${inScope ? "in-scope" : ""} ${at === this.current ? "current" : ""}`;
    cell.tabIndex = at === this.current ? 0 : -1;
    if (!cell.firstChild) {
      const image = await imageOf(rows[place]);
      cell.dataset.name = image.name;
      const labels = [label(className(given[place]))];
      if (suggested[place] !== given[place]) labels.push(" → ", label(className(suggested[place])));
      cell.replaceChildren(pictureOf(image, ""), element("span", { class: "sign" }),
        element("span", { class: "labels" }, ...labels));
    }
    const now = this.describe(place);
    cell.querySelector(".sign").textContent = now.sign;
    cell.setAttribute("aria-label", `image ${cell.dataset.name}, ${now.text}`);
    if (at === this.current) cell.setAttribute("aria-current", "true");
    else cell.removeAttribute("aria-current");
  }

  /** Scroll until a cell is seen. */
  reveal(at) {
    const row = Math.floor(at / this.columns), top = this.box.getBoundingClientRect().top + window.scrollY + row * CELL.height;
    const highest = top - window.innerHeight + byId("verdicts").offsetHeight + CELL.height;
    if (top < window.scrollY) window.scrollTo(0, row === 0 ? 0 : top);
    else if (window.scrollY < highest) window.scrollTo(0, highest);
    this.draw();
    this.add(at);
  }
}
