// Uploads: pictures dropped or pasted anywhere on the page; their progress; a question that is sent
// meanwhile waits for them.
(() => {
  const { say, find, make } = window.minigpt4;
  const MOST = 16; // pictures of a conversation: see web/guard/limits.py
  const root = document.documentElement;

  // --- progress: Gradio uploads with `fetch`, which reports none ------------------------------------
  let running = 0; // uploads
  let waiting = false; // is a question to be sent when they are complete?
  let line = null, told = ""; // the progress, and its text
  const write = () => {
    if (line) line.textContent = waiting ? `${told} · ${say("sent_afterwards")}` : told;
  };
  const tell = (share, sizes) => {
    line ??= make("div", { className: "uploading", role: "status" });
    if (!line.isConnected) find("#composer").prepend(line);
    const total = sizes.reduce((sum, size) => sum + size, 0);
    let number = 0, come = 0;
    while (number < sizes.length - 1 && (come += sizes[number]) <= share * total) number += 1;
    told = say("uploading").replace("{number}", number + 1).replace("{count}", sizes.length)
      .replace("{percent}", Math.floor(share * 100));
    write();
    line.style.setProperty("--share", `${share * 100}%`);
  };
  const end = () => {
    running -= 1;
    if (running) return;
    line?.remove();
    line = null;
  };
  const keepUnsent = () => {
    waiting = false;
    write();
  };
  document.addEventListener("input", ({ target }) => {
    if (target.matches("#box textarea") && !target.value.trim()) keepUnsent();
  });
  document.addEventListener("click", ({ target }) => {
    if (target.closest("#new-chat")) keepUnsent();
  }, true);
  const plain = window.fetch.bind(window);
  const upload = (address, { method, headers, credentials, body }) => new Promise((resolve, reject) => {
    const sizes = [...body.values()].filter((part) => part instanceof Blob).map(({ size }) => size);
    const request = new XMLHttpRequest();
    request.open(method, address);
    request.withCredentials = credentials === "include";
    new Headers(headers).forEach((value, name) => request.setRequestHeader(name, value));
    request.upload.onprogress = ({ loaded, total }) => tell(loaded / total, sizes);
    // A question that waits for a picture is not sent without it. An answer that is not JSON comes
    // from something in between, such as a login page.
    request.onload = () => {
      const answered = /json/.test(request.getResponseHeader("content-type"));
      const status = request.status < 400 && !answered ? 502 : request.status;
      if (status >= 400) keepUnsent();
      resolve(new Response(request.responseText, { status }));
    };
    request.onerror = () => {
      keepUnsent();
      reject(new TypeError("Failed to fetch"));
    };
    request.onloadend = () => setTimeout(end); // after the page has handled the answer
    running += 1;
    tell(0, sizes);
    request.send(body);
  });
  window.fetch = (resource, options) => {
    const address = String(resource?.url ?? resource);
    const told = options?.body instanceof FormData && /\/gradio_api\/upload(\?|$)/.test(address);
    if (told && !options.quiet) return upload(address, options);
    return plain(resource, options).catch((error) => {
      // While the server is unreachable, Gradio sends nothing and keeps requesting /app_id.
      if (address.endsWith("/app_id")) window.minigpt4.failed();
      throw error;
    });
  };

  // --- sending: not before the pictures and the model's settings are there, nor while a conversation
  // is being opened ----------------------------------------------------------------------------------
  let unsettled = 0, until = 0; // changes whose settings the server has yet to send; how long to wait
  const settle = (change) => {
    unsettled = Math.max(0, unsettled + change);
    if (change > 0) until = Date.now() + 10_000;
  };
  const held = () => running > 0 || root.hasAttribute("data-opening") || window.minigpt4.chats.opening || find("#status [data-say=opening]")
    || (unsettled > 0 && Date.now() < until);
  let asking = 0; // the timer that checks whether sending is still held: no event covers all reasons
  const send = () => {
    if (waiting && held()) return;
    clearInterval(asking);
    if (!waiting) return;
    waiting = false;
    setTimeout(() => find("#box .submit-button")?.click(), 50); // a hidden tab draws no frames
  };
  const hold = (event) => {
    if (!held()) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    waiting = true;
    clearInterval(asking);
    asking = setInterval(send, 100);
    write();
  };
  // Call `act` before the message box is sent, by its button or by Enter.
  const beforeSending = (act) => {
    document.addEventListener("click", (event) => {
      if (event.target.closest("#box .submit-button")) act(event);
    }, true);
    document.addEventListener("keydown", (event) => {
      const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
      if (sends && event.target.matches("#box textarea")) act(event);
    }, true);
  };
  beforeSending(hold);
  Object.assign(window.minigpt4, { keepUnsent, settle, beforeSending });

  // --- where pictures come from ---------------------------------------------------------------------
  document.addEventListener("change", (event) => {
    const input = event.target;
    if (!input.matches("#box input[type=file]")) return;
    const count = input.files.length + document.querySelectorAll("#box .thumbnail-wrapper").length
      + document.querySelectorAll("#chat .image-frame img").length;
    if (count <= MOST) return;
    event.stopImmediatePropagation();
    input.value = "";
    window.minigpt4.notice(say("too_many").replace("{count}", count));
  }, true);

  const overlay = make("div", { className: "dropping", role: "status" });
  const hasFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
  // A picture dragged from another page may come as an address only, which text fields may take.
  const isAddress = ({ dataTransfer, target }) => dataTransfer?.types.includes("text/uri-list")
    && !target.matches?.("input, textarea:not(#box *)");
  document.addEventListener("dragenter", (event) => {
    if (!hasFiles(event) || find("dialog[open]")) return;
    overlay.textContent = say("drop_anywhere");
    document.body.append(overlay);
  }, true);
  // The browser must not leave the page for a file that is dropped anywhere.
  document.addEventListener("dragover", (event) => {
    if (hasFiles(event) || isAddress(event)) event.preventDefault();
  }, true);
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) overlay.remove(); // the pointer has left the window
  }, true);
  document.addEventListener("drop", (event) => {
    overlay.remove();
    if (!hasFiles(event) && !isAddress(event)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (!hasFiles(event)) window.minigpt4.notice(say("only_address"));
    else if (!find("dialog[open]")) window.minigpt4.attach(event.dataTransfer.files);
  }, true);
  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    // Word processors add a picture of the copied text, which nobody wants to attach.
    if (!files.length || types.includes("text/plain") || find("dialog[open]")) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    window.minigpt4.attach(files);
  }, true);
})();
