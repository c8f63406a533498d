// Short notices above the message box, each with a button for what can be done about it.
(() => {
  const { make } = window.minigpt4;
  // Screen readers read what is added to a region that is there already.
  const area = make("div", { className: "notices", role: "status", ariaAtomic: "false" });
  document.body?.append(area);
  const shown = {}; // the latest with a button, and the latest without: neither replaces the other
  const notice = (text, label, act, time = 8000) => {
    const box = make("div", { className: "notice" }, make("span", { textContent: text }));
    const end = () => box.remove();
    if (label) {
      const button = make("button", { type: "button", textContent: label });
      button.addEventListener("click", () => { end(); act(); });
      box.append(button);
    }
    shown[Boolean(label)]?.remove();
    shown[Boolean(label)] = box;
    // In an open dialog, or else in the body: a dialog or a phone's drawer blocks what it covers.
    const place = document.querySelector("dialog[open]") ?? document.body;
    if (area.parentElement !== place) place.append(area);
    area.append(box);
    setTimeout(end, time);
    return box;
  };
  Object.assign(window.minigpt4, { notice });
})();
