-- rate: how many prompt tokens wait for prefill, and how fast they are taken while some wait.
--   backlog       HASH    owed:<class>: prompt tokens queued and not bound; weight:<class>; since_ms, taken: the window
--                         that is measured. Gone while nobody waits, so that no error in it can last.
--   prefill-rate  STRING  tokens/s of the windows before; expires
--   service-ms    HASH    by class, what nearly all requests take from their claim to their end; expires (finish.lua)

local WINDOW_MS, FIRST_GUESS_MS = 1000, 250
local RATE_LASTS_S = 600
local BACKLOG, RATE = P .. 'backlog', P .. 'prefill-rate'
local DOUBT = 1.25 -- rates of late are not those to come

owe = function(class, weight, tokens)
  local owed = redis.call('HINCRBY', BACKLOG, 'owed:' .. class, string.format('%d', tokens))
  if weight and owed == tokens then redis.call('HSET', BACKLOG, 'weight:' .. class, weight) end
end

-- tokens were bound; only windows in which somebody waited all the time say how fast prefill can be
local function took(tokens, now)
  local v = redis.call('HMGET', BACKLOG, 'since_ms', 'taken')
  if not v[1] then
    redis.call('HSET', BACKLOG, 'since_ms', now, 'taken', 0)
    return
  end
  local taken, passed = tonumber(v[2]) + tokens, now - tonumber(v[1])
  if passed < WINDOW_MS then
    redis.call('HSET', BACKLOG, 'taken', taken)
    return
  end
  local rate, before = 1000 * taken / passed, redis.call('GET', RATE)
  if before then rate = (rate + tonumber(before)) / 2 end
  redis.call('SET', RATE, string.format('%.1f', rate), 'EX', RATE_LASTS_S)
  redis.call('HSET', BACKLOG, 'since_ms', now, 'taken', 0)
end

local function nobody_waits()
  redis.call('DEL', BACKLOG)
end

-- tokens/s in the first window, before it is over; 0 when it has just begun
local function rate_so_far()
  local v = redis.call('HMGET', BACKLOG, 'since_ms', 'taken')
  local passed = v[1] and now_ms() - v[1] or 0
  return passed >= FIRST_GUESS_MS and 1000 * v[2] / passed or 0
end

-- ms until a new request of `class` would be bound, at the rate of late; nil when that is not known
local function backlog_ms(class, weight)
  local owed = tonumber(redis.call('HGET', BACKLOG, 'owed:' .. class) or 0)
  if owed <= 0 then return nil end
  local rate = tonumber(redis.call('GET', RATE) or rate_so_far())
  if rate <= 0 then return nil end
  local others, named = 0, {}
  local fields = redis.call('HGETALL', BACKLOG)
  for i = 1, #fields, 2 do named[fields[i]] = tonumber(fields[i + 1]) end
  for field, value in pairs(named) do
    local other = string.match(field, '^owed:(.*)$')
    if other and other ~= class and value > 0 then others = others + (named['weight:' .. other] or 1) end
  end
  return math.ceil(1000 * owed / (rate * weight / (others + weight)))
end

-- ms until a new request of `class` would have ended, at the rate of late; nil when that is not known
local function ends_in_ms(class, weight, timeout)
  local wait = backlog_ms(class, weight)
  if not wait then return nil end
  local service = tonumber(redis.call('HGET', P .. 'service-ms', class) or 0)
  -- Where others take longer than this one may, it is short itself, as far as anybody knows.
  return math.ceil(DOUBT * wait + math.min(service, timeout / 2))
end
