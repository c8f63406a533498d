// Texts for the page's scripts; names for screen readers where Gradio gives none, or an English
// one; the server's and Gradio's English errors in the visitor's language.
(() => {
  // Gradio hands every language's texts (texts/*.json) to the page.
  const texts = () => window.gradio_config?.i18n_translations ?? {};
  const language = () => navigator.languages.map((tag) => tag.split("-")[0]).find((tag) => tag in texts()) ?? "en";
  const say = (key) => texts()[language()]?.[`page_${key}`] ?? "";

  // Gradio's name -> the key of the text that replaces it; what "*" stands for is kept.
  const NAMES = {
    "chatbot conversation": "conversation", "user's message: *": "you", "bot's message: *": "bot",
    "Select example *": "example", "Copy message": "copy_message", "Copy": "copy", "copy": "copy",
    "Scroll down": "scroll_down", "Multimedia input field": "message",
    "Upload a file": "add_picture", "File upload": "add_picture", "Uploaded files": "added_pictures",
    "File thumbnail": "added_picture", "Remove file": "remove_picture", "Submit": "submit",
    "Stop": "stop", "number input for *": "number", "range slider for *": "range",
    "Reset to default value": "reset", "Liked": "liked", "Disliked": "disliked",
  };
  const patterns = Object.entries(NAMES).map(([name, key]) => [
    new RegExp(`^${name.replace("*", "([^]*)")}$`), key,
  ]);
  const translated = (name) => {
    for (const [pattern, key] of patterns) {
      const found = name.match(pattern);
      if (found) return say(key).replace("*", () => found[1]) || name;
    }
    return name;
  };
  const translate = (element) => {
    for (const attribute of ["aria-label", "title"]) {
      const name = element.getAttribute(attribute);
      if (name && translated(name) !== name) element.setAttribute(attribute, translated(name));
    }
  };

  // The text's key -> the errors that it replaces, from web/guard and from Gradio's client.
  const ERRORS = {
    "error_connection": /connection to the server was lost|connection errored out|failed to fetch/i,
    "error_too_large": /the request is larger than|file size exceeds|^HTTP 413/i,
    "error_no_picture": /invalid file type/i,
    "error_too_slow": /took too long to arrive|^HTTP (408|504)/i,
    "error_disk_full": /disk is full/i,
    "error_out_of_range": /^Value \S+ is (greater|less) than/,
    "error_upload": /^HTTP \d/, // a proxy's answer to an upload
    "error_too_many_requests": /sent too many requests|queue is full/i,
  };
  // Gradio adds a second message to the notice that shows the first one.
  const isNotice = (node) => node.closest("[data-testid=toast-body]") || node.querySelector("[data-testid=toast-body]");
  const explain = (notice) => {
    const walker = document.createTreeWalker(notice, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const key = Object.keys(ERRORS).find((name) => ERRORS[name].test(walker.currentNode.data));
      if (key) walker.currentNode.data = say(key);
    }
  };

  // Give an element these properties; role and aria as attributes, since Firefox ESR 115 has no
  // such properties.
  const set = (element, values) => {
    for (const [name, value] of Object.entries(values)) {
      if (value === undefined) continue;
      if (name !== "role" && !name.startsWith("aria")) element[name] = value;
      else element.setAttribute(name.replace("aria", "aria-").toLowerCase(), value);
    }
    return element;
  };
  // Write the texts of the page's own parts, whose data attributes name them.
  const write = (part) => {
    const { say: text, label, placeholder } = part.dataset;
    if (text && part.textContent !== say(text)) part.textContent = say(text);
    if (placeholder && part.placeholder !== say(placeholder)) part.placeholder = say(placeholder);
    if (!label || part.getAttribute("aria-label") === say(label)) return;
    set(part, { ariaLabel: say(label) });
    if (part.matches("button")) part.title = say(label);
  };
  // Gradio's accordions do not tell whether they are open, and their sign is read out.
  const expanded = (button) => {
    set(button, { ariaExpanded: button.classList.contains("open") });
    set(button.querySelector(".icon"), { ariaHidden: "true" });
  };
  document.addEventListener("click", ({ target }) => {
    const button = target.closest(".label-wrap");
    if (button) setTimeout(expanded, 0, button);
  });
  const complete = (node) => {
    const all = (selector) => [
      ...(node.matches(selector) ? [node] : []), ...node.querySelectorAll(selector),
    ];
    all("[aria-label], [title]").forEach(translate);
    for (const icon of all("button[aria-label] svg[aria-label]")) icon.setAttribute("aria-hidden", "true");
    if (isNotice(node)) explain(node);
    all("[data-say]").forEach(write);
    all("[data-label]").forEach(write);
    all(".label-wrap").forEach(expanded);
    // Not a button: it holds the one that closes.
    for (const found of all(".toast-header")) {
      found.removeAttribute("role");
      found.removeAttribute("tabindex");
    }
    for (const found of all("#box .thumbnails")) found.setAttribute("role", "list");
    for (const found of all("#reason .submit-button")) set(found, { ariaLabel: say("submit"), title: say("submit") });
    for (const found of all("#chat :is(pre, table)")) found.setAttribute("tabindex", "0"); // they scroll
    for (const found of all("#chat .md :is(ul, ol, blockquote)")) found.dir = "auto"; // markers on the right side
  };
  new MutationObserver((changes) => {
    for (const { type, target, addedNodes } of changes) {
      if (type === "attributes") translate(target);
      if (target.dataset?.say || target.dataset?.label) write(target); // a part that was redrawn
      for (const node of addedNodes) if (node.nodeType === Node.ELEMENT_NODE) complete(node);
    }
    // Gradio sets the page's language to English if it does not have the visitor's.
    const page = document.documentElement;
    if (page.lang.split("-")[0] !== language()) page.lang = language();
    // Screen readers read an answer when it is complete, not word by word.
    const busy = String(document.querySelector("#box .stop-button") !== null);
    const log = document.querySelector("#chat [role=log]");
    if (log && log.getAttribute("aria-busy") !== busy) set(log, { ariaBusy: busy });
  }).observe(document.documentElement, {
    childList: true, subtree: true, attributeFilter: ["aria-label"],
  });
  const find = (selector) => document.querySelector(selector);
  // Call `act` once before the next frame whenever elements were added or removed.
  const whenRedrawn = (act) => {
    let waiting = false;
    new MutationObserver(() => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        act();
      });
    }).observe(document.documentElement, { childList: true, subtree: true });
  };
  // Call `act` with each message of the chat and its buttons whenever the page was redrawn; returns
  // the function that does so.
  const forMessages = (act) => {
    const update = () => document.querySelectorAll("#chat .message-row").forEach((row, place) => {
      const buttons = row.nextElementSibling;
      if (buttons?.matches(".message-buttons")) act(buttons, place, row);
    });
    whenRedrawn(update);
    return update;
  };
  // For screen readers, the pictures and the text of a question, each a message of Gradio's, are one
  // group: its first part has the name and owns the others.
  const mark = (part, name, value) => {
    if (!part || part.getAttribute(name) === value) return;
    if (value) part.setAttribute(name, value); else part.removeAttribute(name);
  };
  whenRedrawn(() => {
    const groups = [];
    let before;
    document.querySelectorAll("#chat .message-row").forEach((row, place) => {
      row.id = `row-${place}`;
      if (row.matches(".user-row") && before?.matches(".user-row:has(.component)")) groups.at(-1).push(row);
      else groups.push([row]);
      before = row;
    });
    for (const rows of groups) for (const row of rows) {
      const part = row.querySelector("[data-testid]"), [first, ...others] = rows;
      mark(part, "role", row === first ? "group" : "none"); // a name without a role is not read out
      mark(part, "aria-label", row === first ? say(row.matches(".user-row") ? "you" : "bot") : null);
      mark(part, "aria-owns", row === first ? others.map(({ id }) => id).join(" ") || null : null);
    }
  });
  // An element with these properties and children.
  const make = (tag, values = {}, ...children) => {
    const made = set(document.createElement(tag), values);
    made.append(...children);
    return made;
  };
  window.minigpt4 = { say, find, whenRedrawn, forMessages, make, set, isNotice };
})();
