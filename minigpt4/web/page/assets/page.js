// What Gradio lacks: copying and editing as written, reading while it scrolls, keys, saving, dark mode.
(() => {
  const { say, make } = window.minigpt4;
  // Gradio's link ignores the path under which a proxy may serve the page.
  const manifest = `${window.gradio_config?.root ?? "."}/manifest.json`;
  document.querySelector("link[rel=manifest]")?.setAttribute("href", manifest);
  // A button's data-act names the function of window.minigpt4 that it calls.
  document.addEventListener("click", ({ target }) => {
    const act = target.closest("[data-act]")?.dataset.act;
    if (act) window.minigpt4[act]();
  });
  // render.py escapes characters so that they stay text, and marks formulas. This restores the text as
  // it was written, to be copied or edited.
  const written = (text) => text.replace(/\\\(\{\}(.*?)\\\)/g, "$$$1$$")
    .replace(/&#00(\d{2,3});/g, (_, code) => String.fromCharCode(code));
  if (navigator.clipboard?.writeText) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(written(String(text)));
  }
  // Without HTTPS, there is no navigator.clipboard, and Gradio copies from a hidden textarea.
  document.addEventListener("copy", (event) => {
    if (!event.target.matches?.("body > textarea")) return;
    event.clipboardData.setData("text/plain", written(event.target.value));
    event.preventDefault();
  });
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

  // Gradio keeps editing the message at a place even if another message moves there: end it before.
  const editButtons = (box) => [
    ...box.closest(".message-row").nextElementSibling?.querySelectorAll("button") ?? [],
  ];
  const endEditing = () => {
    for (const box of document.querySelectorAll("#chat textarea")) editButtons(box)[1]?.click();
  };
  // Retry and Undo below an answer, if the target is among its buttons; others belong to a question.
  const turns = (target) => [...target.closest("#chat .message-buttons-left")?.querySelectorAll(".icon-button") ?? []]
    .filter((button) => button.getAttribute("aria-label") !== say("copy_message")).slice(0, 2);
  const goesOn = (target) => {
    const option = target.closest("#chat .option");
    return option && option.textContent.trim() !== say("preview");
  };
  const saved = (target) => [...document.querySelectorAll("#chat textarea")]
    .some((box) => editButtons(box)[0]?.contains(target));
  // No other turn begins until the engine has accepted the question, nor while another conversation is
  // being opened.
  document.addEventListener("click", (event) => {
    const { target } = event;
    const other = target.closest("#chat .version button, #hello .card");
    const turn = other || goesOn(target) || saved(target) || turns(target).some((button) => button.contains(target));
    const opening = window.minigpt4.chats.opening;
    if (!turn || !(opening || window.minigpt4.unaccepted())) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (!opening) window.minigpt4.notice(say("busy"));
  }, true);
  document.addEventListener("click", ({ target }) => {
    const button = target.closest("#chat .message-buttons-left .icon-button");
    if (button && button.getAttribute("aria-label") !== say("copy_message")) endEditing();
  }, true);
  // Retry, Continue and saving an edited question send at once.
  document.addEventListener("click", ({ target }) => {
    if (goesOn(target) || saved(target) || turns(target)[0]?.contains(target)) window.minigpt4.sending(true);
  }, true);

  // Gradio scrolls to the end at each update. Visitors who have scrolled up to read stay there until
  // they reach the end again or ask something.
  const NEAR = 40; // pixels
  let reading = false, asked = false, last = 0, count = 0; // the scroll position; the number of questions
  const resized = new ResizeObserver(([{ target }]) => { // a phone's keyboard opens, for example
    if (!reading) target.scrollTop = target.scrollHeight;
  });
  window.minigpt4.whenRedrawn(() => {
    const wrap = document.querySelector("#chat .bubble-wrap");
    if (!wrap) return;
    if (!wrap.observed) resized.observe(Object.assign(wrap, { observed: true }));
    if (!Object.hasOwn(wrap, "scrollTo")) wrap.scrollTo = (...place) => {
      if (!reading) Element.prototype.scrollTo.apply(wrap, place);
    };
    const before = count;
    count = wrap.querySelectorAll(".user-row").length;
    if (count !== before) [reading, asked] = [false, count > before];
    if (asked && !reading) wrap.scrollTop = wrap.scrollHeight;
    asked &&= document.documentElement.hasAttribute("data-sending");
  });
  document.addEventListener("scroll", ({ target }) => {
    if (!target.matches?.("#chat .bubble-wrap")) return;
    const place = target.scrollTop;
    if (target.scrollHeight - target.clientHeight - place < NEAR) reading = false;
    else if (place < last) reading = true;
    last = place;
  }, true);
  document.addEventListener("click", ({ target }) => {
    if (target.closest("#chat .scroll-down-button-container")) reading = false;
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) {
      // A key that ends the composition of a word (Chinese, Japanese, ...) neither sends nor stops.
      if (["Enter", "Escape"].includes(event.key)) event.stopImmediatePropagation();
    } else if (event.target.matches?.("#chat textarea")) { // a message is being edited
      const [save, cancel] = editButtons(event.target);
      if (event.key === "Escape") cancel?.click();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save?.click();
    } else if (event.key === "Escape" && !event.target.closest?.("#rail, .drawer, dialog, .menu")) {
      window.minigpt4.keepUnsent(); // in those, Escape closes them
      window.minigpt4.stop();
    }
  }, true);

  const save = ({ name, type, text }) => {
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  };
  // The visitor's choice of light or dark overrides Gradio's, which follows the system. The root
  // has the class from the start, the body as soon as Gradio sets it.
  let chosen = null;
  try { chosen = localStorage.getItem("minigpt4:theme"); } catch { /* the browser keeps nothing */ }
  const apply = () => {
    if (chosen) document.body?.classList.toggle("dark", chosen === "dark");
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const dark = (chosen ?? system) === "dark";
    document.documentElement.classList.toggle("dark", dark);
    for (const meta of document.querySelectorAll("meta[name=theme-color]")) meta.content = dark ? "#191917" : "#faf9f7";
  };
  const theme = () => {
    const dark = document.documentElement.classList.contains("dark");
    chosen = dark ? "light" : "dark";
    try { localStorage.setItem("minigpt4:theme", chosen); } catch { /* only until a reload */ }
    apply();
  };
  const follow = () => {
    apply();
    new MutationObserver(apply).observe(document.body, { attributeFilter: ["class"] });
  };
  apply();
  if (document.body) follow(); else addEventListener("DOMContentLoaded", follow);

  Object.assign(window.minigpt4, { save, theme, endEditing });
})();
