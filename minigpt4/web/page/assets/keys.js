// Keyboard shortcuts, and their list under "?".
(() => {
  const { say, button } = window.minigpt4;
  const find = (selector) => document.querySelector(selector);
  const CONTROL = /Mac|iP/.test(navigator.platform) ? "⌘" : "Ctrl";
  const KEYS = [
    ["key_send", "Enter"], ["key_line", "Shift", "Enter"], ["key_stop", "Esc"],
    ["key_edit", "↑"], ["key_box", "/"], ["new_chat", CONTROL, "Shift", "O"],
    ["key_turn", "←", "→"], ["shortcuts", "?"],
  ];

  const shortcuts = () => {
    if (find("dialog[open]")) return;
    const dialog = document.createElement("dialog");
    const head = document.createElement("div");
    const list = document.createElement("dl");
    head.className = "drawer-head";
    head.append(
      Object.assign(document.createElement("h2"), { textContent: say("shortcuts") }),
      button("close", "close", () => dialog.close()),
    );
    for (const [key, ...caps] of KEYS) {
      const term = Object.assign(document.createElement("dt"), { textContent: say(key) });
      const keys = document.createElement("dd");
      keys.append(...caps.map((cap) =>
        Object.assign(document.createElement("kbd"), { textContent: cap })));
      list.append(term, keys);
    }
    Object.assign(dialog, { id: "shortcuts", ariaLabel: say("shortcuts") });
    dialog.append(head, list);
    dialog.addEventListener("click", ({ target }) => { if (target === dialog) dialog.close(); });
    dialog.addEventListener("close", () => dialog.remove()); // the browser gives the focus back
    document.body.append(dialog);
    dialog.showModal();
  };

  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    const command = event.ctrlKey || event.metaKey;
    const writing = target.matches?.("input:not([type=radio], [type=range]), textarea, [contenteditable]");
    const act = () => event.preventDefault();
    if (event.isComposing || find("dialog[open]")) return;
    if (command && event.shiftKey && key.toLowerCase() === "o") {
      act();
      find("#new-chat")?.click();
    } else if (key === "ArrowUp" && target.matches?.("#box textarea") && !target.value) {
      const edit = [...document.querySelectorAll("#chat button:has(.feather-edit-2)")].at(-1);
      if (edit) { act(); edit.click(); }
    } else if (command || event.altKey || writing) return;
    else if (key === "?") { act(); shortcuts(); }
    else if (key === "/") { act(); find("#box textarea")?.focus(); }
  });
  Object.assign(window.minigpt4, { shortcuts });
})();
