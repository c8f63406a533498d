// A short notice near the composer, with a button for what can be done about it.
(() => {
  let shown = null, ending;
  const notice = (text, label, act, time = 8000) => {
    shown?.remove();
    clearTimeout(ending);
    const box = shown = document.createElement("div");
    box.className = "notice";
    box.setAttribute("role", "status");
    const end = () => box.remove();
    box.append(Object.assign(document.createElement("span"), { textContent: text }));
    if (label) {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: label });
      button.addEventListener("click", () => { end(); act(); });
      box.append(button);
    }
    (document.getElementById("composer") ?? document.body).append(box);
    ending = setTimeout(end, time);
  };
  Object.assign(window.minigpt4, { notice });
})();
