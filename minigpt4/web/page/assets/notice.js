// Short notices above the message box, each with a button for what can be done about it.
(() => {
  const { make } = window.minigpt4;
  const area = make("div", { className: "notices" });
  const shown = {}; // the latest with a button, and the latest without: neither replaces the other
  const notice = (text, label, act, time = 8000) => {
    const box = make("div", { className: "notice", role: "status" }, make("span", { textContent: text }));
    const end = () => box.remove();
    if (label) {
      const button = make("button", { type: "button", textContent: label });
      button.addEventListener("click", () => { end(); act(); });
      box.append(button);
    }
    shown[Boolean(label)]?.remove();
    shown[Boolean(label)] = box;
    area.append(box);
    // In an open dialog, or else in the body: a dialog or a phone's drawer blocks what it covers.
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    setTimeout(end, time);
    return box;
  };
  Object.assign(window.minigpt4, { notice });
})();
