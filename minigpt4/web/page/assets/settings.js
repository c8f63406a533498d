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
  // Gradio reports a text when its field loses the focus; the page may be left before that.
  document.addEventListener("input", ({ target }) => {
    const name = target.closest("#set-seed, #set-system")?.id.slice("set-".length);
    if (name) keep(name, target.value);
  });
  // Gradio would report a number at every key, in its range or not. Instead it gets the nearest
  // possible number when typing has ended. An emptied field gets its former number back.
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
  // The settings at the start: without the system prompt if a conversation is opened, which has one.
  const begin = () => {
    const { system, ...others } = load();
    return location.hash.startsWith("#/c/") ? others : load();
  };
  Object.assign(window.minigpt4, { settings: { load, keep, begin } });
})();
