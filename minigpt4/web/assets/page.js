// What Gradio has no part for: keys, copying what was written, saving a file, light or dark.
(() => {
  const { say } = window.minigpt4;
  // shown.py writes "<" and "![" so that they stay text; copied and edited they are themselves.
  const written = (text) => text.replaceAll("&#0060;", "<").replaceAll("&#0091;", "[");
  if (navigator.clipboard?.writeText) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(written(String(text)));
  }
  // The box that Gradio opens to edit a message.
  const editing = (box) => {
    if (!box.closest("#chat")) return;
    box.setAttribute("aria-label", say("edit"));
    if (box.value !== written(box.value)) {
      box.value = written(box.value);
      box.dispatchEvent(new Event("input", { bubbles: true }));
    }
    box.focus();
  };
  new MutationObserver((changes) => {
    for (const { addedNodes } of changes) for (const node of addedNodes) {
      if (node.nodeType !== Node.ELEMENT_NODE) continue;
      const boxes = [...node.querySelectorAll("textarea")];
      if (node.matches("textarea")) boxes.push(node);
      for (const box of boxes) setTimeout(() => editing(box));
    }
  }).observe(document.documentElement, { childList: true, subtree: true });

  document.addEventListener("keydown", (event) => {
    // Enter that ends a word being composed (Chinese, Japanese, ...) does not send.
    if (event.key === "Enter" && (event.isComposing || event.keyCode === 229)) {
      event.stopImmediatePropagation();
    }
    if (event.key === "Escape") document.querySelector("#box .stop-button")?.click();
  }, true);

  const save = ({ name, type, text }) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  };
  // The visitor's choice of light or dark outlives Gradio's own, which follows the system.
  const chosen = () => localStorage.getItem("minigpt4:theme");
  const apply = () => {
    if (chosen()) document.body.classList.toggle("dark", chosen() === "dark");
  };
  const theme = () => {
    const dark = document.body.classList.contains("dark");
    localStorage.setItem("minigpt4:theme", dark ? "light" : "dark");
    apply();
  };
  const follow = () => {
    apply();
    new MutationObserver(apply).observe(document.body, { attributeFilter: ["class"] });
  };
  if (document.body) follow(); else addEventListener("DOMContentLoaded", follow);

  // Recent conversations live in this browser's localStorage, each under a key of its own, so that
  // two open pages do not overwrite each other.
  const KEY = "minigpt4:chat:", MOST = 20;
  const changed = () => dispatchEvent(new Event("minigpt4:recent"));
  const load = () => {
    const found = [];
    for (let i = 0; i < localStorage.length; i++) {
      const key = localStorage.key(i);
      if (!key.startsWith(KEY)) continue;
      try {
        const entry = JSON.parse(localStorage.getItem(key));
        if (entry && entry.data) found.push({ key, ...entry });
      } catch { localStorage.removeItem(key); }
    }
    return found.sort((a, b) => b.time - a.time);
  };

  const store = (key, entry) => {
    // The oldest make room: for the number kept, and for the browser's limit.
    for (const old of load().filter((e) => e.key !== key).slice(MOST - 1)) {
      localStorage.removeItem(old.key);
    }
    for (;;) {
      try { localStorage.setItem(key, JSON.stringify(entry)); return changed(); }
      catch {
        const oldest = load().filter((e) => e.key !== key).pop();
        if (!oldest) return;
        localStorage.removeItem(oldest.key);
      }
    }
  };

  const remove = (key) => {
    localStorage.removeItem(key);
    changed();
  };

  const keep = (record) => {
    if (!record?.data) return;
    const key = KEY + record.name;
    const old = load().find((entry) => entry.key === key);
    const title = old?.named ? old.title : record.data.title;
    store(key, { title, named: old?.named, time: Date.now(), data: record.data });
  };
  Object.assign(window.minigpt4, { save, theme, recent: { KEY, load, store, remove, keep } });
})();
