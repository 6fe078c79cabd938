//! What happens next: the lifecycle of one incarnation as a plain state machine, `(state, input, now) -> actions`.
//!
//! It does no I/O, has no clock and knows neither Incus nor a byte of the session; the driver feeds it what they answer.
//! `now` is a monotonic time of the driver's choosing. The driver makes durable what an input rests on before it feeds it.
//!
//! ```text
//!   Looking ──absent──► Creating ──► Starting ──► Dialing ──► Live ──end──► Stopping ──► Collecting
//!     ▲  └──stopped────────────────────▲            │  ▲        │               │             │
//!     │  └──running────────────────────┼────────────┘  │        └──────end──────┴─────────────┤
//!     └────────────── session lost ────┴───────────────┴──── lost ──┘                         ▼
//!                                                       Done ◄── Destroying ◄── Concluding ◄──┘
//! ```
//!
//! Happy path: there is no instance, so it is created and started; the agent is dialled and asked to start the workload;
//! its terminal event is the end; outputs are collected; the verdict is made durable; the instance is destroyed.
//!
//! Failure paths: every end but the guest's own word is decided in one place, once: Incus refuses
//! (`provision_failed`), a deadline passes (`timed_out`), the instance or its supervisor is gone (`guest_died`), the guest is
//! not heard (`unreachable`), a person cancels (`cancelled`). Whatever the end, collection is tried within a budget of its
//! own (Invariant 7), then the verdict is made durable (Invariant 2), and only then is anything destroyed.

mod step;
mod types;

pub use step::Machine;
pub use types::{Action, CallFailure, EndDecision, Found, Guest, Input, Phase, Plan, SessionLoss, Start, last_word};

#[cfg(test)]
mod tests;
