// Drawers (the rail on phones, settings, a website), menus, and where the focus goes.
(() => {
  const { say, find, make, set } = window.minigpt4;
  const PHONE = matchMedia("(max-width: 900px)");
  let opener = null;

  // Show the drawer of this name, and no other; "" closes.
  const drawer = (name) => {
    const before = document.documentElement.dataset.drawer ?? "";
    if (before === name) return;
    if (name && !before) opener = document.activeElement;
    document.documentElement.dataset.drawer = name;
    for (const button of document.querySelectorAll("[data-drawer]:not(html)")) {
      set(button, { ariaExpanded: button.dataset.drawer === name });
    }
    // The keyboard cannot reach what a drawer covers.
    for (const id of ["rail", "main"]) {
      const part = document.getElementById(id);
      if (part) part.inert = Boolean(name) && PHONE.matches && id !== name;
    }
    const enter = () => {
      if (document.documentElement.dataset.drawer !== name) return; // it has been closed again
      if (!document.activeElement.closest(`#${name}`)) find(`#${name} [data-close]`)?.focus();
    };
    const leave = () => { // not from what the visitor has focused meanwhile
      if (!document.documentElement.dataset.drawer && !document.activeElement.closest("#main")) opener?.focus();
    };
    if (!name) leave();
    setTimeout(name ? enter : leave, 50); // what was hidden is visible by then
  };
  PHONE.addEventListener("change", () => drawer(""));
  addEventListener("popstate", () => { if (PHONE.matches) drawer(""); }); // it would cover the page

  const close = (menu, focus) => {
    menu.hidden = true;
    set(menu.previousElementSibling, { ariaExpanded: "false" });
    if (focus) menu.previousElementSibling.focus();
  };
  const open = (button) => {
    const menu = button.nextElementSibling;
    menu.hidden = false;
    set(button, { ariaExpanded: "true" });
    menu.querySelector("[role=menuitem]").focus();
  };

  document.addEventListener("click", ({ target, detail, isTrusted }) => {
    const button = target.closest("[aria-haspopup=menu]");
    if (detail > 1 && (button || target.closest("[data-drawer]:not(html)"))) return; // a double click
    const opened = find(".menu:not([hidden])");
    if (opened) close(opened, target.closest(".menu") || button);
    if (button && button !== opened?.previousElementSibling) open(button);
    const toggle = target.closest("[data-drawer]:not(html)");
    const name = document.documentElement.dataset.drawer, begun = target.closest("#new-chat");
    if (toggle) drawer(name === toggle.dataset.drawer ? "" : toggle.dataset.drawer);
    else if (target.closest("[data-close]")) drawer("");
    else if (begun || (name === "rail" && !target.closest("#rail, .notice"))) drawer("");
    // Who begins a chat writes next. On a phone, the keyboard would cover the examples.
    if (begun && isTrusted && matchMedia("(hover: hover)").matches) find("#box textarea").focus();
  });

  document.addEventListener("keydown", (event) => {
    const menu = event.target.closest?.(".menu");
    if (event.key === "Escape") {
      if (menu) close(menu, true);
      else if (PHONE.matches || event.target.closest?.("#rail, .drawer")) {
        if (!event.target.matches?.("#rail input")) drawer(""); // a name is being edited
      }
    } else if (menu && ["ArrowDown", "ArrowUp", "Home", "End"].includes(event.key)) {
      const items = [...menu.querySelectorAll("[role=menuitem]")];
      const at = items.indexOf(document.activeElement);
      const step = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
      items.at(step % items.length).focus();
      event.preventDefault();
    } else if (menu && event.key === "Tab") close(menu, false);
  });

  // A focused button may disappear after its action (Retry, Delete), or be hidden or disabled first:
  // then the message box gets the focus.
  let focused = null;
  const usable = (node) => node.isConnected && !node.disabled && node.getClientRects().length > 0;
  const lost = () => {
    if (!focused || document.activeElement !== document.body || usable(focused)) return;
    focused = null;
    find("#box textarea")?.focus({ preventScroll: true });
  };
  document.addEventListener("focusin", ({ target }) => { focused = target; });
  document.addEventListener("focusout", ({ target, relatedTarget }) => {
    if (relatedTarget) return;
    setTimeout(() => { // the event comes before the element is removed
      if (usable(target) && focused === target) focused = null;
      else lost();
    });
  });
  new MutationObserver(lost).observe(document.documentElement, { childList: true, subtree: true });

  // A button with an icon; its name is a text, and what it is about.
  const button = (key, icon, act, about = "") => {
    const name = about ? `${say(key)}: ${about}` : say(key);
    const made = make("button", { type: "button", className: "icon", title: name, ariaLabel: name });
    made.dataset.icon = icon;
    made.addEventListener("click", act);
    return made;
  };
  // A dialog, not shown yet. It is removed when it closes, and the browser restores the focus.
  const makeDialog = (id, label) => {
    const made = make("dialog", { id, ariaLabel: label });
    made.addEventListener("close", () => made.remove());
    return made;
  };
  const showDialog = (dialog) => {
    document.body.append(dialog);
    dialog.showModal();
  };
  Object.assign(window.minigpt4, { drawer, button, makeDialog, showDialog });
})();
