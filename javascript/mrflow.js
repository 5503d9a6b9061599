// MrFlow's page helper. Python makes the plan line from the values on the page, whenever one of them changes. A change
// that the page cannot see (a checkpoint that was loaded meanwhile) is asked for when the pointer enters the accordion.
// Answers to quick changes may arrive out of order, so each new line is asked for once more.

const mrflow = {
    pause: 1500,
    settle: 700,
    asked: 0,
    seen: "",
    timer: null,

    element(name) {
        return gradioApp().querySelector(`#script_mrflow_${name}`);
    },

    ask() {
        mrflow.asked = Date.now();
        mrflow.element("refresh")?.click();
    },

    refresh() {
        if (Date.now() - mrflow.asked > mrflow.pause) mrflow.ask();
    },

    // The page may be shown before it handles clicks, and then the first one is lost.
    first(tries) {
        if (mrflow.element("plan")?.textContent.trim() || tries === 0) return;
        mrflow.ask();
        setTimeout(() => mrflow.first(tries - 1), mrflow.pause);
    },

    changed() {
        const line = mrflow.element("plan")?.querySelector(".mrflow-plan")?.textContent ?? "";
        if (line === mrflow.seen) return;
        mrflow.seen = line;
        clearTimeout(mrflow.timer);
        mrflow.timer = setTimeout(mrflow.ask, mrflow.settle);
    },

    start() {
        const accordion = mrflow.element("enabled");
        const plan = mrflow.element("plan");
        if (!accordion || !plan) return;
        accordion.addEventListener("pointerenter", mrflow.refresh);
        new MutationObserver(mrflow.changed).observe(plan, {childList: true, characterData: true, subtree: true});
        mrflow.first(20);
    },
};

onUiLoaded(mrflow.start);
