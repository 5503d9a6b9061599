// What a WebUI's page offers to extensions, and the accordion whose header is a checkbox.

const gradioApp = () => document;
const pageHost = {
    loaded: [],

    // A checkbox changed from outside (paste, settings): the accordion and its visible checkbox follow.
    follow(id, on) {
        const accordion = document.getElementById(id);
        if (accordion && accordion.visibleCheckbox) accordion.show(on);
    },

    setUp(accordion) {
        const header = accordion.querySelector(".label-wrap");
        const hidden = document.querySelector(`#${accordion.id}-checkbox input`);
        const extra = document.getElementById(`${accordion.id}-extra`);
        const box = document.createElement("input");
        const isOpen = () => header.classList.contains("open");
        box.type = "checkbox";
        box.id = `${accordion.id}-visible-checkbox`;
        box.className = `${hidden.className} input-accordion-checkbox`;
        box.checked = isOpen();
        const tell = () => { if (hidden.checked !== box.checked) hidden.click(); };
        accordion.visibleCheckbox = box;
        let linked = true; // until the user clicks the checkbox itself: then folding and switching are two things
        accordion.show = (on) => { box.checked = on; if (linked && isOpen() !== on) header.click(); };
        box.addEventListener("click", (event) => { linked = false; event.stopPropagation(); });
        box.addEventListener("change", tell);
        new MutationObserver(() => {
            accordion.classList.toggle("input-accordion-open", isOpen());
            if (linked) { box.checked = isOpen(); tell(); }
        }).observe(header, {attributes: true, attributeFilter: ["class"]});
        if (extra) header.insertBefore(extra, header.lastElementChild);
        header.querySelector("span").prepend(box);
        accordion.classList.toggle("input-accordion-open", isOpen());
    },
};

// Translates text nodes by their whole text, as WebUIs do.
function translate(root) {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
        const found = window.localization[node.textContent.trim()];
        if (found && !["SCRIPT", "STYLE"].includes(node.parentElement.nodeName)) node.textContent = found;
    }
}

function onUiLoaded(callback) {
    pageHost.loaded.push(callback);
}

document.addEventListener("DOMContentLoaded", () => {
    const timer = setInterval(() => {
        if (!document.querySelector("#txt2img_prompt textarea, #txt2img_prompt input")) return;
        if (!document.querySelector(".input-accordion .label-wrap")) return;
        clearInterval(timer);
        document.querySelectorAll(".input-accordion").forEach(pageHost.setUp);
        pageHost.loaded.forEach((callback) => callback());
        translate(document.body);
        document.body.dataset.ready = "yes";
    }, 100);
});
