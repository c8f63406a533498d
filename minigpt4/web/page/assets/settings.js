// The visitor's settings, kept in this browser: the preset, and what was changed by hand.
(() => {
  const KEY = "minigpt4:settings";
  const load = () => {
    try { return JSON.parse(localStorage.getItem(KEY)) ?? {}; } catch { return {}; }
  };
  const keep = (name, value) => {
    const { seed, system, model, ...sampling } = load();
    const values = { seed, system, model, ...(name === "preset" ? {} : sampling), [name]: value };
    try { localStorage.setItem(KEY, JSON.stringify(values)); } catch { /* there is no room */ }
  };
  // Gradio tells of a text when it has been left; the page may be left before that.
  document.addEventListener("input", ({ target }) => {
    const name = target.closest("#set-seed, #set-system")?.id.slice("set-".length);
    if (name) keep(name, target.value);
  });
  // Gradio would tell of a number at every key, in its range or not: it learns of the number that is
  // possible once one has typed it. An emptied field takes back what it had.
  const NUMBER = "#advanced input[type=number]";
  let before = "";
  document.addEventListener("focusin", ({ target }) => { if (target.matches(NUMBER)) before = target.value; });
  document.addEventListener("input", (event) => {
    if (event.isTrusted && event.target.matches(NUMBER)) event.stopImmediatePropagation();
  }, true);
  document.addEventListener("change", ({ target }) => {
    if (!target.matches(NUMBER)) return;
    const { value, min, max, step } = target;
    const number = Math.min(max, Math.max(min, value === "" ? before : value));
    before = target.value = Number.isInteger(Number(step)) ? Math.round(number) : number;
    target.dispatchEvent(new Event("input", { bubbles: true }));
  }, true);
  // At the start: a conversation that is being opened has a system prompt of its own.
  const begin = () => {
    const { system, ...others } = load();
    return location.hash.startsWith("#/c/") ? others : load();
  };
  Object.assign(window.minigpt4, { settings: { load, keep, begin } });
})();
