// Keys of the review page. A key is ignored until the server has answered the previous one, so that
// no decision is made about a picture that was not seen.
(() => {
  const shown = () => document.querySelector("#shown textarea, #shown input")?.value ?? "";
  const typing = (target) => target.closest?.("textarea, input, select");
  let waitingFor = null;

  // The text is sent when typing pauses. Gradio's own event misses pasting and deleting.
  let pause;
  document.addEventListener("input", (event) => {
    if (!event.target.closest?.("#text")) return;
    clearTimeout(pause);
    pause = setTimeout(() => document.querySelector("#note")?.click(), 200);
  }, true);

  function press(button) {
    if (waitingFor !== null && waitingFor === shown()) return;
    clearTimeout(pause);
    waitingFor = shown();
    document.querySelector(button)?.click();
  }

  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    const commanded = event.ctrlKey || event.metaKey;
    if (typing(target)) {
      if (key === "Escape") target.blur();
      if (key === "Enter" && commanded) {
        event.preventDefault();
        event.stopPropagation();
        target.blur();
        press("#keep");
      }
      return;
    }
    if (commanded || event.altKey || event.repeat) return;
    const button = { k: "#keep", d: "#drop", ArrowLeft: "#back" }[key.length === 1 ? key.toLowerCase() : key];
    if (button) {
      event.preventDefault();
      press(button);
    } else if (key.toLowerCase() === "e") {
      event.preventDefault();
      document.querySelector("#text textarea")?.focus();
    }
  }, true);
})();
