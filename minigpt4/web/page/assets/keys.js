// Keyboard shortcuts, and their list under "?".
(() => {
  const { say, find, button, make, makeDialog, showDialog } = window.minigpt4;
  const CONTROL = /Mac|iP/.test(navigator.platform) ? "⌘" : "Ctrl";
  const KEYS = [
    ["submit", "Enter"], ["key_line", "Shift", "Enter"], ["key_stop", "Esc"],
    ["key_edit", "↑"], ["key_box", "/"], ["new_chat", CONTROL, "Shift", "O"],
    ["key_turn", "←", "→"], ["shortcuts", "?"],
  ];

  const shortcuts = () => {
    if (find("dialog[open]")) return;
    const dialog = makeDialog("shortcuts", say("shortcuts"));
    const head = make("div", { className: "drawer-head" }, make("h2", { textContent: say("shortcuts") }),
      button("close", "close", () => dialog.close()));
    const list = KEYS.flatMap(([key, ...caps]) => [
      make("dt", { textContent: say(key) }),
      make("dd", {}, ...caps.map((cap) => make("kbd", { textContent: cap }))),
    ]);
    dialog.append(head, make("dl", {}, ...list));
    dialog.addEventListener("click", ({ target }) => { if (target === dialog) dialog.close(); });
    showDialog(dialog);
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
      find("#box textarea")?.focus();
    } else if (key === "ArrowUp" && target.matches?.("#box textarea") && !target.value) {
      const edit = [...document.querySelectorAll("#chat button:has(.feather-edit-2)")].at(-1);
      if (edit) { act(); edit.click(); }
    } else if (command || event.altKey || writing) return;
    else if (key === "?") { act(); shortcuts(); }
    else if (key === "/") { act(); find("#box textarea")?.focus(); }
  });
  Object.assign(window.minigpt4, { shortcuts });
})();
