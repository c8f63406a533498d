// A short notice near the composer, with a button for what can be done about it.
(() => {
  const { make } = window.minigpt4;
  let shown = null, ending;
  const notice = (text, label, act, time = 8000) => {
    shown?.remove();
    clearTimeout(ending);
    const box = shown = make("div", { className: "notice", role: "status" },
      make("span", { textContent: text }));
    const end = () => box.remove();
    if (label) {
      const button = make("button", { type: "button", textContent: label });
      button.addEventListener("click", () => { end(); act(); });
      box.append(button);
    }
    (document.getElementById("composer") ?? document.body).append(box);
    ending = setTimeout(end, time);
  };
  Object.assign(window.minigpt4, { notice });
})();
