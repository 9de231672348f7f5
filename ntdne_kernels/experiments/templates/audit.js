const form = document.getElementById("filters");
const named = document.getElementById("named"), suspectsOnly = document.getElementById("suspects-only");
function filter() {
  const name = named.value.trim().toLowerCase(), only = suspectsOnly !== null && suspectsOnly.checked;
  for (const section of document.querySelectorAll(".class")) {
    let shown = !only;
    for (const item of section.querySelectorAll(".item")) {
      item.hidden = only && item.querySelector(".suspect") === null;
      shown ||= !item.hidden;
    }
    section.hidden = !shown || !section.dataset.name.toLowerCase().includes(name);
  }
}
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter();
