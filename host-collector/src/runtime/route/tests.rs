use super::*;

const VSOCK: Way = Way { transport: Transport::Vsock, agent: Agent::Image };
const IMAGE: Way = Way { transport: Transport::Exec, agent: Agent::Image };
const PLACED: Way = Way { transport: Transport::Exec, agent: Agent::Placed };
const PUT: Way = Way { transport: Transport::Exec, agent: Agent::Put };

fn route_of(kind: InstanceType, policy: AgentPolicy, is_heard: bool) -> Route {
    let mut spec = RuntimeSpec::default();
    (spec.incus.instance_type, spec.incus.agent) = (kind, policy);
    Route::new(&spec, is_heard, None)
}

fn container(policy: AgentPolicy, is_heard: bool) -> Route {
    route_of(InstanceType::Container, policy, is_heard)
}

fn machine(policy: AgentPolicy, is_heard: bool) -> Route {
    route_of(InstanceType::VirtualMachine, policy, is_heard)
}

fn lost() -> SessionLoss {
    SessionLoss::Lost("reset".to_owned())
}

fn died() -> SessionLoss {
    SessionLoss::Died("killed".to_owned())
}

fn none() -> SessionLoss {
    SessionLoss::NoAgent("the image has none".to_owned())
}

#[test]
fn a_container_has_one_way() {
    let mut route = container(AgentPolicy::Auto, false);
    for _ in 0..10 {
        assert_eq!(route.take(), IMAGE);
        assert_eq!(route.missed(lost()), Err(lost()));
    }
}

#[test]
fn a_machine_is_dialled_over_vsock_and_sometimes_by_exec() {
    let mut route = machine(AgentPolicy::Auto, false);
    let ways: Vec<_> = (0..9)
        .map(|_| {
            let way = route.take();
            assert!(route.missed(lost()).is_err());
            way
        })
        .collect();
    assert_eq!(ways, [VSOCK, VSOCK, VSOCK, IMAGE, VSOCK, VSOCK, VSOCK, IMAGE, VSOCK]);
}

/// A session by exec is none for ever: the next one is tried over vsock again.
#[test]
fn after_a_session_vsock_comes_first() {
    let mut route = machine(AgentPolicy::Auto, false);
    assert_eq!(route.take(), VSOCK);
    assert_eq!(route.missed(SessionLoss::NoTransport("no device".to_owned())), Ok(IMAGE));
    route.opened();
    assert_eq!(route.take(), VSOCK);
}

/// At once: nobody waits for a clock where Incus itself said that there is none.
#[test]
fn an_image_without_an_agent_gets_ours() {
    for mut route in [container(AgentPolicy::Auto, false), container(AgentPolicy::Baked, true)] {
        assert_eq!(route.take(), IMAGE);
        assert_eq!(route.missed(none()), Ok(PLACED));
        assert_eq!(route.missed(none()), Ok(PUT));
        route.opened();
        // It is not sent again, and the image's is not asked for again.
        assert_eq!(route.take(), PLACED);
        assert_eq!(route.missed(lost()), Err(lost()));
        assert_eq!(route.take(), PLACED);
    }
}

#[test]
fn a_baked_image_without_an_agent_gets_none() {
    let mut route = container(AgentPolicy::Baked, false);
    assert_eq!(route.take(), IMAGE);
    let loss = route.missed(none()).unwrap_err();
    assert!(matches!(&loss, SessionLoss::NoAgent(m) if m.contains("has none") && m.contains("`auto`")), "{loss:?}");
    // Nor where it crashes, until it was heard.
    for _ in 0..2 * MAX_DEATHS {
        assert_eq!(route.take(), IMAGE);
        assert_eq!(route.missed(died()), Err(died()));
    }
    route.opened();
    assert_eq!(route.take(), IMAGE);
    assert_eq!(route.missed(none()), Ok(PLACED));
}

#[test]
fn what_is_injected_never_asks_for_the_images() {
    for mut route in [container(AgentPolicy::Inject, false), machine(AgentPolicy::Inject, false)] {
        for _ in 0..5 {
            assert_eq!(route.take(), PLACED);
            assert_eq!(route.missed(none()), Ok(PUT));
            assert!(matches!(route.missed(none()), Err(SessionLoss::NoAgent(_))));
            route.agent = Agent::Placed;
        }
    }
}

/// Whoever takes a runtime over goes on with the agent that answered last.
#[test]
fn the_agent_of_the_last_session_comes_first() {
    let mut spec = RuntimeSpec::default();
    for (kind, way) in [(InstanceType::Container, IMAGE), (InstanceType::VirtualMachine, VSOCK)] {
        spec.incus.instance_type = kind;
        assert_eq!(Route::new(&spec, true, Some(AgentOrigin::Host)).take(), PLACED);
        assert_eq!(Route::new(&spec, true, Some(AgentOrigin::Image)).take(), way);
    }
}

/// One that dies again and again is no better than none.
#[test]
fn an_agent_that_only_dies_is_replaced() {
    let mut silent = container(AgentPolicy::Auto, false);
    let mut short = container(AgentPolicy::Baked, true);
    for _ in 0..MAX_DEATHS {
        assert_eq!((silent.take(), short.take()), (IMAGE, IMAGE));
        assert_eq!(silent.missed(died()), Err(died()));
        short.opened();
        short.lost(&died(), false);
    }
    assert_eq!((silent.take(), short.take()), (PLACED, PLACED));
    let mut served = machine(AgentPolicy::Baked, true);
    for _ in 0..MAX_DEATHS {
        assert_eq!(served.take(), VSOCK);
        served.opened();
        served.lost(&died(), false);
    }
    assert_eq!(served.take(), PLACED, "also where it is served");
}

#[test]
fn an_agent_that_holds_is_not_nor_one_whose_connections_break() {
    let mut route = container(AgentPolicy::Auto, false);
    for _ in 0..10 {
        assert_eq!(route.take(), IMAGE);
        route.opened();
        route.lost(&lost(), false);
    }
    let mut route = container(AgentPolicy::Auto, false);
    for _ in 0..10 {
        for held in [false, false, true] {
            assert_eq!(route.take(), IMAGE);
            route.opened();
            route.lost(&died(), held);
        }
    }
}

/// A file that was cut by a crash of the machine may be there, and not be an agent.
#[test]
fn ours_is_put_in_anew_where_it_says_nothing() {
    let mut route = container(AgentPolicy::Inject, true);
    assert_eq!(route.take(), PLACED);
    assert_eq!(route.missed(died()), Err(died()));
    assert_eq!(route.take(), PUT);
}

/// An upgrade in mid-run that this host does not fit costs nothing that was begun; before it, the image is to be baked anew.
#[test]
fn an_agent_that_does_not_fit_is_replaced_in_mid_run_only() {
    let unfit = || SessionLoss::Refused("speaks 2".to_owned());
    let mut fresh = container(AgentPolicy::Auto, false);
    assert_eq!((fresh.take(), fresh.missed(unfit())), (IMAGE, Err(unfit())));
    let mut heard = container(AgentPolicy::Auto, true);
    assert_eq!((heard.take(), heard.missed(unfit())), (IMAGE, Ok(PLACED)));
    let mut served = machine(AgentPolicy::Baked, true);
    assert_eq!((served.take(), served.missed(unfit())), (VSOCK, Ok(PLACED)));
}

#[test]
fn a_guest_that_does_not_take_it_is_told_with_both_reasons() {
    let not_put = || SessionLoss::NotPut("the disk is full".to_owned());
    let both = "the image has none; and the disk is full".to_owned();
    let mut route = container(AgentPolicy::Auto, false);
    route.take();
    assert_eq!((route.missed(none()), route.missed(none())), (Ok(PLACED), Ok(PUT)));
    for _ in 1..MAX_REFUSED_PUTS {
        assert_eq!(route.missed(not_put()), Err(SessionLoss::Lost(both.clone())));
        assert_eq!(route.take(), PUT);
    }
    assert_eq!(route.missed(not_put()), Err(SessionLoss::NoAgent(both.clone())));
    // In mid-run that is no end: its disk may have room again before it counts as unreachable.
    let mut heard = container(AgentPolicy::Auto, true);
    heard.take();
    assert_eq!((heard.missed(none()), heard.missed(none())), (Ok(PLACED), Ok(PUT)));
    for _ in 0..2 * MAX_REFUSED_PUTS {
        assert_eq!(heard.missed(not_put()), Err(SessionLoss::Lost(both.clone())));
        assert_eq!(heard.take(), PUT);
    }
}

/// Incus's own agent comes up when it comes up, and another may be served meanwhile.
#[test]
fn a_machine_waits_for_what_a_container_does_not() {
    let mut route = machine(AgentPolicy::Auto, false);
    let mut ways = Vec::new();
    for _ in 0..8 {
        let mut way = route.take();
        ways.push(way);
        let loss = |way: Way| if way == VSOCK { lost() } else { none() };
        while let Ok(next) = route.missed(loss(way)) {
            way = next;
            ways.push(way);
        }
    }
    assert_eq!(
        ways,
        [VSOCK, VSOCK, VSOCK, IMAGE, PLACED, PUT, VSOCK, VSOCK, VSOCK, IMAGE, PLACED, PUT],
        "no end but what boot_secs sets"
    );
}
