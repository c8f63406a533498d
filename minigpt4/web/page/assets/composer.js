// The message box: what can be sent, where pictures come from, and the wait for an answer.
(() => {
  const { say, find, button, make, makeDialog, showDialog, beforeSending, isNotice } = window.minigpt4;
  const root = document.documentElement;

  const early = []; // pictures that were pasted or dropped before the message box was there
  const attach = (files) => {
    const input = find("#box input[type=file]");
    if (!input) {
      early.push(...files);
      return;
    }
    const transfer = new DataTransfer();
    for (const file of files) transfer.items.add(file);
    if (!transfer.files.length) return;
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    find("#box textarea").focus();
  };
  // After a click on ×, the next picture's × takes its place: with the focus, a Space would press it.
  document.addEventListener("click", ({ target }) => {
    if (target.closest("#box .delete-button")) find("#box textarea").focus();
  }, true);
  const choose = () => {
    const input = find("#box input[type=file]");
    input.value = ""; // so that choosing the same file again is a change
    input.click();
  };

  // `data-sending` is there from sending until the turn has ended; from when the engine has accepted the
  // question, it is "accepted". A stop before that waits for it.
  let stopping = false;
  const stop = () => {
    const button = find("#box .stop-button");
    stopping = !button && root.hasAttribute("data-sending");
    button?.click();
  };
  const sending = (now) => {
    if (now) root.dataset.sending = ""; else delete root.dataset.sending;
    stopping = false;
  };
  // When the engine accepts a question, the box is emptied; what was typed since sending is kept.
  let sent = null, typed = null, questions = 0; // the texts sent and typed since; questions sent
  const unaccepted = () => sent !== null;
  const asSent = (box) => (unaccepted() ? { ...box, text: sent } : box);
  const forget = () => {
    [sent, typed] = [null, null];
    window.minigpt4.draft.send(false);
  };
  // A question was answered or refused. After a quick answer, the box is emptied a moment later.
  const ended = () => {
    const question = questions;
    setTimeout(() => { if (question === questions) forget(); }, 100);
  };
  // The question has not reached the server.
  const failed = () => {
    sending(false);
    forget();
  };
  const write = (field, text) => {
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const surplus = () => {
    const [before, now] = [sent, typed];
    [sent, typed] = [null, null];
    if (before === null || now === null || now === before) return "";
    return now.startsWith(before) ? now.slice(before.length).trimStart() : now;
  };
  const emptied = () => {
    const more = surplus(), field = find("#box textarea");
    if (more && field) write(field, more);
  };
  // Put a text into the box, before what is in it.
  const putBack = (text) => {
    const field = find("#box textarea");
    if (text) write(field, [text, field.value].filter(Boolean).join("\n"));
  };
  // What is typed between a click on Undo and the question's return to the box is kept, too.
  let undoing = null; // the box's text at the click, and its text now
  const undone = () => {
    const field = find("#box textarea");
    if (!undoing || !field || field.value === undoing.now) return;
    const { before, now } = undoing, { value } = field;
    undoing = null;
    if (now === before || !value.endsWith(before)) return;
    const question = value.slice(0, value.length - before.length).trimEnd();
    write(field, question ? `${question}\n${now}` : now);
  };
  document.addEventListener("click", ({ target }) => {
    const field = target.closest("#chat .message-buttons-left") && find("#box textarea");
    if (field) undoing = { before: field.value, now: field.value };
  }, true);
  document.addEventListener("beforeinput", undone, true);
  // Notices stand above the message box, however high it and the lines below it are.
  const height = new ResizeObserver((changes) => {
    for (const { target } of changes) root.style.setProperty(`--${target.id}`, `${target.offsetHeight}px`);
  });
  const isEmpty = () => !find("#box textarea")?.value.trim() && !find("#box .thumbnail-wrapper");
  const update = () => {
    if (early.length && find("#box input[type=file]")) attach(early.splice(0));
    for (const part of document.querySelectorAll("#composer, #lines")) {
      if (!part.measured) height.observe(Object.assign(part, { measured: true }));
    }
    const button = find("#box .submit-button"), empty = isEmpty();
    if (button && button.disabled !== empty) button.disabled = empty;
  };
  const onSend = (event) => {
    const button = find("#box .submit-button");
    const again = event.repeat || unaccepted() || (!button && isEmpty()); // held, or pressed twice
    if (again || button?.disabled) {
      event.preventDefault();
      event.stopImmediatePropagation();
      if (button?.disabled) window.minigpt4.notice(say("error_empty_message"));
      else if (!event.repeat && unaccepted() && sent !== find("#box textarea").value) {
        window.minigpt4.notice(say("busy"));
      }
      return;
    }
    if (!button) return;
    window.minigpt4.endEditing();
    undoing = null;
    sending(true);
    questions += 1;
    [sent, typed] = [find("#box textarea").value, null];
    window.minigpt4.draft.send(true);
  };
  document.addEventListener("input", ({ target }) => {
    update();
    if (undoing && target.matches("#box textarea")) undoing.now = target.value;
    if (sent === null || !target.matches("#box textarea")) return;
    if (typed?.startsWith(sent) && !target.value.startsWith(sent)) { // the box was emptied between
      target.value = typed.slice(sent.length).trimStart() + target.value;
      [sent, typed] = [null, null];
    } else typed = target.value;
  }, true);
  beforeSending(onSend);
  new MutationObserver((changes) => {
    update();
    const notices = changes.flatMap(({ addedNodes }) => [...addedNodes])
      .map((node) => node.nodeType === Node.ELEMENT_NODE && isNotice(node)).filter(Boolean);
    const button = find("#box .stop-button");
    if (notices.some(({ classList }) => classList.contains("error")) && !button) failed();
    // After this notice one can ask again at once, before the turn has ended.
    if (notices.some((notice) => notice.querySelector(".refused"))) forget();
    if (button && root.dataset.sending === "") root.dataset.sending = "accepted";
    if (stopping && button) stop();
  }).observe(root, { childList: true, subtree: true });

  // The camera, which is on as soon as its window is open.
  const camera = () => {
    if (find("#camera")) return; // a double click
    const dialog = makeDialog("camera", say("camera"));
    const video = make("video", { autoplay: true, muted: true, playsInline: true });
    const none = make("p", { textContent: say("no_camera") });
    let facing = "environment", latest = 0; // which camera; the number of the latest start
    const stop = (stream) => stream?.getTracks().forEach((track) => track.stop());
    const start = async () => {
      stop(video.srcObject);
      shot.disabled = true;
      const number = latest += 1;
      try {
        const stream = await navigator.mediaDevices.getUserMedia({
          video: { facingMode: facing, width: { ideal: 1920 } },
        });
        if (!dialog.open || number !== latest) return stop(stream); // nothing would stop it later
        none.replaceWith(video);
        video.srcObject = stream;
      } catch { // no camera, no permission, or a page without HTTPS
        if (number === latest) video.replaceWith(none);
      }
    };
    const shoot = () => {
      shot.disabled = true;
      const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob((blob) => {
        attach([new File([blob], "camera.jpg", { type: "image/jpeg" })]);
        dialog.close();
      }, "image/jpeg", 0.92);
    };
    const shot = button("shoot", "camera", shoot);
    shot.classList.add("shoot");
    shot.disabled = true;
    video.addEventListener("playing", () => { shot.disabled = false; });
    dialog.append(video, button("other_camera", "turn", () => {
      facing = facing === "user" ? "environment" : "user";
      start();
    }), shot, button("close", "close", () => dialog.close()));
    dialog.addEventListener("close", () => stop(video.srcObject));
    showDialog(dialog);
    start();
  };
  Object.assign(window.minigpt4, { attach, choose, sending, unaccepted, asSent, forget, ended, failed, surplus, emptied, putBack, undone, stop, camera });
})();
