// What Gradio has no part for: keys, copying what was written, saving files, light and dark.
(() => {
  const { say } = window.minigpt4;
  // render.py escapes characters so that they stay text, and marks formulas; copied or edited, they
  // are what was written.
  const written = (text) => text.replace(/\\\(\{\}(.*?)\\\)/g, "$$$1$$")
    .replace(/&#00(\d{2,3});/g, (_, code) => String.fromCharCode(code));
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
    if (event.isComposing || event.keyCode === 229) {
      // A key that ends the composition of a word (Chinese, Japanese, ...) neither sends nor stops.
      if (["Enter", "Escape"].includes(event.key)) event.stopImmediatePropagation();
    } else if (event.target.matches?.("#chat textarea")) { // a message is being edited
      const [save, cancel] = event.target.closest(".message-row").nextElementSibling
        ?.querySelectorAll("button") ?? [];
      if (event.key === "Escape") cancel?.click();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save?.click();
    } else if (event.key === "Escape" && !event.target.closest?.("#rail, .drawer, dialog, .menu")) {
      document.querySelector("#box .stop-button")?.click(); // there, Escape ends something else
    }
  }, true);

  const save = ({ name, type, text }) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  };
  // The visitor's choice of light or dark overrides Gradio's, which follows the system. The root
  // has the class from the start, the body as soon as Gradio sets it.
  const chosen = () => localStorage.getItem("minigpt4:theme");
  const apply = () => {
    if (chosen()) document.body?.classList.toggle("dark", chosen() === "dark");
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const dark = (chosen() ?? system) === "dark";
    document.documentElement.classList.toggle("dark", dark);
  };
  const theme = () => {
    const dark = document.documentElement.classList.contains("dark");
    localStorage.setItem("minigpt4:theme", dark ? "light" : "dark");
    apply();
  };
  const follow = () => {
    apply();
    new MutationObserver(apply).observe(document.body, { attributeFilter: ["class"] });
  };
  apply();
  if (document.body) follow(); else addEventListener("DOMContentLoaded", follow);

  // Recent conversations are kept in this browser's localStorage, each under its own key. If two
  // pages continue the same one, the later to store it uses another key.
  const KEY = "minigpt4:chat:", MOST = 20;
  const changed = () => dispatchEvent(new Event("minigpt4:recent"));
  const load = () => {
    const found = [];
    for (const key of Object.keys(localStorage)) { // a copy: damaged entries are removed
      if (!key.startsWith(KEY)) continue;
      try {
        const entry = JSON.parse(localStorage.getItem(key));
        if (entry && entry.data) found.push({ key, ...entry });
      } catch { localStorage.removeItem(key); }
    }
    return found.sort((a, b) => b.time - a.time);
  };
  const find = (key) => load().find((entry) => entry.key === key);

  const store = (key, entry) => {
    // The oldest make room, both for the number kept and for the browser's limit.
    for (const old of load().filter((e) => e.key !== key).slice(MOST - 1)) {
      localStorage.removeItem(old.key);
    }
    for (;;) {
      try { localStorage.setItem(key, JSON.stringify(entry)); break; }
      catch {
        const oldest = load().filter((e) => e.key !== key).pop();
        if (!oldest) break;
        localStorage.removeItem(oldest.key);
      }
    }
    changed();
  };

  const remove = (key) => {
    localStorage.removeItem(key);
    changed();
  };

  // A conversation's name -> the key and time at which this page last stored or opened it.
  const places = new Map();
  const keep = (record) => {
    if (!record?.data) return;
    const { name, data } = record;
    let { key, time } = places.get(name) ?? { key: KEY + name };
    const old = find(key);
    if (old && old.time !== time) key = KEY + Math.random().toString(36).slice(2);
    const title = old?.named ? old.title : data.title;
    store(key, { title, named: old?.named, time: Date.now(), data });
    places.set(name, { key, time: find(key)?.time }); // without room, the earlier time
  };
  // What the server gets when an entry of the list is opened.
  const opening = ({ key, time, data }) => {
    const name = key.slice(KEY.length);
    places.set(name, { key, time });
    return { name, data };
  };
  Object.assign(window.minigpt4, {
    save, theme, recent: { load, find, store, remove, keep, opening },
  });
})();
